"""Ranking by CPU and drive at once: the CPU the newer tokens, from mirrored keys, the drive the older."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from hillinfer.context import Context
from hillinfer.evaluation import EMPTY
from hillinfer.session import Brought, EvaluateItem, Session
from hillinfer.split.boundary import BLOCK_TOKENS, LEAST_GAIN, Boundary, Stop, choose
from hillinfer.split.estimates import Estimate
from hillinfer.split.mirror import Mirror
from hillinfer_core import kernel
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import TILE_TOKENS, Reduction
from hillinfer_core.reference import I32, U32, Ranges, Ranked

PROBE_EVERY = 128
"""Rankings of the drive alone after which the CPU's speed is looked at again. Our choice."""

_PROBES = 2  # in a row: the first of them also brings code and keys into the caches


@dataclass(frozen=True)
class SplitReport:
    """Of each layer, its latest boundary; imbalance is |T_cpu - T_drive| of the larger, as measured."""

    boundaries: dict[int, Boundary]
    measured_imbalance: dict[int, float]
    mirrored_bytes: int


class SplitRanking:
    """A `SelectionPolicy` whose winners are those of `ColdPoolRanking`, to the bit.

    share: of the tokens that the CPU ranks, 0 to 1, in whole blocks; None to have it follow the measured
    speeds of both sides. limit_bytes: of mirrored keys, over all layers and contexts; may be changed at
    any time. The drive is asked for scores, winners are merged, and only rows of those that won are
    fetched: a second request, in exchange for no row that loses. One `select` at a time, from any thread.
    """

    def __init__(
        self, share: float | None = None, limit_bytes: int = 0, *, least_gain: float = LEAST_GAIN
    ) -> None:
        if share is not None and not 0 <= share <= 1:
            raise InvalidInput(f"the CPU's share must be 0 to 1, not {share}")
        self.share = share
        self.limit_bytes = limit_bytes
        self.cpu, self.drive, self.rows = Estimate(), Estimate(), Estimate()
        self.cpu_repeats = 1
        """How often the CPU ranks the same: above 1 it is slowed on purpose, for measurements."""
        self._least_gain = least_gain
        self._mirrors: WeakKeyDictionary[Context, dict[int, Mirror]] = WeakKeyDictionary()
        self._boundaries: dict[int, Boundary] = {}
        self._imbalance: dict[int, float] = {}
        self._unsplit = 0
        self._worker = ThreadPoolExecutor(1, "hillinfer-cpu-ranking")

    @property
    def mirrored_bytes(self) -> int:
        """Bytes of mirrored keys held now."""
        return sum(
            mirror.nbytes for layers in list(self._mirrors.values()) for mirror in list(layers.values())
        )

    def report(self) -> SplitReport:
        """Report where the boundaries are and why."""
        return SplitReport(dict(self._boundaries), dict(self._imbalance), self.mirrored_bytes)

    def close(self) -> None:
        """Drop all mirrored keys and end the worker."""
        self._mirrors.clear()
        self._worker.shutdown()

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought]:
        """See `SelectionPolicy.select`."""
        boundaries = [self._boundary(layer, item, len(items)) for item in items]
        starts = [
            max(item.first, (item.end - each.cpu_tokens) // TILE_TOKENS * TILE_TOKENS)
            if each.cpu_tokens
            else item.end
            for item, each in zip(items, boundaries, strict=True)
        ]
        if all(start == item.end for start, item in zip(starts, items, strict=True)):
            return self._alone(session, layer, items)
        return self._together(session, layer, items, starts)

    def _boundary(self, layer: int, item: EvaluateItem, batch: int) -> Boundary:
        tokens, shape = item.end - item.first, item.context.shape
        per_token = shape.kv_heads * shape.key_tile_bytes // TILE_TOKENS
        # A block less for each mirror: its first tile and the flushed tokens past the range are more.
        limit = self.limit_bytes // (shape.layers * batch * per_token) - BLOCK_TOKENS
        limit = max(0, limit)
        current = self._boundaries.get(layer, Boundary(0, Stop.no_gain, 0, 0)).cpu_tokens
        if self.share is not None:
            wanted = min(round(self.share * tokens), limit) // BLOCK_TOKENS * BLOCK_TOKENS
            chosen = Boundary(
                wanted,
                Stop.fixed,
                self.cpu.seconds(wanted * per_token),
                self.drive.seconds((tokens - wanted) * per_token),
            )
        elif not self.drive.known or min(limit, tokens) < BLOCK_TOKENS:
            chosen = Boundary(0, Stop.memory if limit < BLOCK_TOKENS else Stop.no_gain, 0, 0)
        elif self._probing():
            chosen = Boundary(BLOCK_TOKENS, Stop.block, 0, 0)
        else:
            extra = self.rows.overhead_s
            chosen = choose(
                tokens, current, limit, per_token * batch, self.cpu, self.drive, extra, self._least_gain
            )
        self._boundaries[layer] = chosen
        return chosen

    def _probing(self) -> bool:
        return self.cpu.observations < _PROBES or self._unsplit >= PROBE_EVERY

    def _alone(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought]:
        for item in items:
            self._mirrors.setdefault(item.context, {}).pop(layer, None)
        started = time.perf_counter()
        brought = session.evaluate_and_bring(layer, items)
        seconds = time.perf_counter() - started
        rows = sum(len(each.rows) for each in brought)
        # The time of the rows is no part of ranking; never all of it, whatever the estimate says.
        ranking = max(seconds - rows * self.rows.s_per_unit, seconds / 4)
        self.drive.observe(sum(each.evaluated_bytes for each in brought), ranking)
        self._unsplit += 1
        return brought

    def _together(
        self, session: Session, layer: int, items: Sequence[EvaluateItem], starts: Sequence[int]
    ) -> list[Brought]:
        self._unsplit = 0
        mirrors = [self._mirror(layer, item, start) for item, start in zip(items, starts, strict=True)]
        on_cpu = self._worker.submit(self._rank_on_cpu, items, starts, mirrors)
        began = time.perf_counter()
        try:
            asked = [(at, item) for at, item in enumerate(items) if starts[at] > item.first]
            ranked = session.rank(layer, [_older(item, starts[at]) for at, item in asked])
            drive_s = time.perf_counter() - began
        finally:
            on_cpu.exception()
        host, cpu_s, cpu_bytes = on_cpu.result()
        answers = {at: answer for (at, _), answer in zip(asked, ranked, strict=True)}
        self.cpu.observe(cpu_bytes, cpu_s)
        self.drive.observe(sum(each.evaluated_bytes for each in ranked), drive_s)
        if asked:
            self._imbalance[layer] = abs(cpu_s - drive_s) / max(cpu_s, drive_s)
        return [
            self._finish(session, layer, item, mirrors[at], host[at], answers.get(at))
            for at, item in enumerate(items)
        ]

    def _mirror(self, layer: int, item: EvaluateItem, start: int) -> Mirror:
        mirror = self._mirrors.setdefault(item.context, {}).setdefault(layer, Mirror())
        if start < item.end:
            first = start // TILE_TOKENS * TILE_TOKENS
            mirror.cover(item.context, layer, first, -(-item.end // TILE_TOKENS) * TILE_TOKENS)
        return mirror

    def _rank_on_cpu(
        self, items: Sequence[EvaluateItem], starts: Sequence[int], mirrors: Sequence[Mirror]
    ) -> tuple[list[Ranked | None], float, int]:
        began, scanned = time.perf_counter(), 0
        ranked: list[Ranked | None] = []
        for item, start, mirror in zip(items, starts, mirrors, strict=True):
            if start >= item.end or mirror.scale is None:
                ranked.append(None)
                continue
            precision = item.context.shape.precision
            # With the sum a query is quantised by the scale alone: zero shifts all scores of a head alike.
            q, _, _ = kernel.quantise_query(item.query, Ranges(mirror.scale, mirror.scale), Reduction.sum)
            for _ in range(self.cpu_repeats):
                best = kernel.rank(mirror.parts, q, precision, start, item.end, item.k, origin=mirror.first)
            ranked.append(best)
            per_token = item.context.shape.kv_heads * item.context.shape.key_tile_bytes // TILE_TOKENS
            scanned += (item.end - start) * per_token
        return ranked, time.perf_counter() - began, scanned

    def _finish(
        self,
        session: Session,
        layer: int,
        item: EvaluateItem,
        mirror: Mirror,
        host: Ranked | None,
        drive: Brought | None,
    ) -> Brought:
        if host is not None and drive is not None and drive.generation != mirror.generation:
            # Scores of two generations do not compare: the drive ranks all, the mirror begins anew.
            mirror.drop()
            return session.evaluate_and_bring(layer, [item])[0]
        blocks = []
        if drive is not None:
            assert drive.scores is not None
            blocks.append(Ranked(drive.ids, drive.scores))
        if host is not None:
            blocks.append(host)
        best = kernel.merge(blocks, item.k)
        missing = [_lacking(ids, held) for ids, held in zip(best.ids, item.held, strict=True)]
        counts = [len(each) for each in missing]
        before, began = session.counters.read_bytes, time.perf_counter()
        rows = item.context.fetch_rows(layer, missing)
        if sum(counts):
            self.rows.observe(sum(counts), time.perf_counter() - began)
        read = session.counters.read_bytes - before
        generation = mirror.generation if drive is None else drive.generation
        scanned = 0 if drive is None else drive.evaluated_bytes
        return Brought(best.ids, counts, rows, generation, scanned, read, _scores(best))


def _older(item: EvaluateItem, end: int) -> EvaluateItem:
    nothing = np.empty((len(item.held), 0), np.uint32)
    return item._replace(end=end, k=min(item.k, end - item.first), held=nothing)


def _lacking(ids: U32, held: U32) -> U32:
    has = held[held != EMPTY]
    return ids[~np.isin(ids, has)]


def _scores(best: Ranked) -> I32:
    return best.scores
