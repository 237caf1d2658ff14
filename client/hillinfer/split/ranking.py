"""Ranking by CPU and drive at once: the CPU the newer tokens, from mirrored keys, the drive the older."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self
from weakref import WeakKeyDictionary

import numpy as np

from hillinfer.context import Context
from hillinfer.session import Brought, EvaluateItem, Session
from hillinfer.split.boundary import BLOCK_TOKENS, LEAST_GAIN, Boundary
from hillinfer.split.controller import Controller, Times
from hillinfer.split.estimates import Latest
from hillinfer.split.mirror import Mirror
from hillinfer_core import kernel
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import TILE_TOKENS, Reduction
from hillinfer_core.reference import U32, Ranges, Ranked

CpuShare = float | Literal["auto"]
"""Of the tokens, ranked by the CPU: 0 to 1, or as many as it takes for both sides to finish together."""


def parse_cpu_share(text: str | float) -> CpuShare:
    """Read "auto", or a share as "0.25" or 0.25; raises InvalidInput."""
    if text == "auto":
        return "auto"
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InvalidInput(f"the CPU's share of the tokens is auto, or 0 to 1, not {text!r}")
    return share


@dataclass(frozen=True)
class SplitReport:
    """Of each layer, its latest boundary; imbalance is |T_cpu - T_drive| of the larger, as measured: the
    median of the latest.

    cpu_tokens of tokens: ranked by the CPU, of all that were ranked, since the policy was made.
    """

    boundaries: dict[int, Boundary]
    measured_imbalance: dict[int, float]
    mirrored_bytes: int
    cpu_tokens: int
    tokens: int


@dataclass
class _Host:
    """What the CPU found, and when it was done."""

    ranked: list[Ranked | None] = field(default_factory=list)
    nbytes: int = 0
    scan_s: float = 0.0
    ended: float = 0.0
    error: Exception | None = None


class SplitRanking:
    """A `SelectionPolicy` whose winners are those of `ColdPoolRanking`, to the bit.

    share: of the tokens that the CPU ranks, 0 to 1, in whole blocks; None to have it follow the measured
    speeds of both sides. limit_bytes: of mirrored keys, over all layers and the contexts of a batch; may be
    changed at any time; None for as much as a cache grants it (`reserve`). The drive is asked for scores,
    winners are merged, and only rows of those that won are fetched: a second request, in exchange for no
    row that loses. One `select` at a time, from any thread; for one cache, as its times are of one model.
    """

    def __init__(
        self,
        share: float | None = None,
        limit_bytes: int | None = None,
        *,
        least_gain: float = LEAST_GAIN,
    ) -> None:
        if share is not None:
            parse_cpu_share(share)
        self.limit_bytes = limit_bytes
        self.controllers: dict[int, Controller] = {}
        """Of the layers ranked so far."""
        self.cpu_repeats = 1
        """How often the CPU ranks the same: above 1 it is slowed on purpose, for measurements."""
        self.latest: Times | None = None
        """Of the last ranking; None if the drive ranked alone."""
        self._granted: int | None = None
        self._wanted: dict[int, int] = {}
        self._share, self._least_gain = share, least_gain
        self._mirrors: WeakKeyDictionary[Context, dict[int, Mirror]] = WeakKeyDictionary()
        self._imbalance: dict[int, Latest] = {}
        self._cpu_tokens = self._tokens = 0

    @classmethod
    def with_share(cls, share: CpuShare) -> Self:
        """Return one for a share as `parse_cpu_share` gives it, whose bytes a cache grants."""
        return cls(None if share == "auto" else share)

    @property
    def mirrored_bytes(self) -> int:
        """Bytes of mirrored keys held now."""
        return self.held_bytes(list(self._mirrors))

    def held_bytes(self, contexts: Iterable[Context]) -> int:
        """Bytes of mirrored keys of these contexts held now."""
        return sum(
            mirror.nbytes for each in contexts for mirror in list(self._mirrors.get(each, {}).values())
        )

    def reserve(self, room: int, contexts: Sequence[Context]) -> int:
        """Grant the boundary what it wants of ``room`` bytes, and return what that and the mirrors take.

        To be called before a step's rankings by whoever holds these contexts and counts their bytes. The
        boundary moves within what was granted, so that it may be a step behind what it wants.
        """
        self._granted = max(0, min(room, max(self._wanted.values(), default=0)))
        return max(self._granted, self.held_bytes(contexts))

    def report(self) -> SplitReport:
        """Report where the boundaries are and why."""
        return SplitReport(
            {layer: each.boundary for layer, each in self.controllers.items()},
            {layer: each.median for layer, each in self._imbalance.items()},
            self.mirrored_bytes,
            self._cpu_tokens,
            self._tokens,
        )

    def forget(self, contexts: Iterable[Context]) -> None:
        """Drop the mirrored keys of these contexts."""
        for context in contexts:
            self._mirrors.pop(context, None)

    def close(self) -> None:
        """Drop all mirrored keys; idempotent."""
        self._mirrors.clear()

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought]:
        """See `SelectionPolicy.select`."""
        controller = self.controllers.get(layer)
        if controller is None:
            controller = self.controllers[layer] = Controller(self._share, self._least_gain, layer)
        boundaries = [self._boundary(controller, layer, item, len(items)) for item in items]
        starts = [
            max(item.first, (item.end - each.cpu_tokens) // TILE_TOKENS * TILE_TOKENS)
            if each.cpu_tokens
            else item.end
            for item, each in zip(items, boundaries, strict=True)
        ]
        self._tokens += sum(item.end - item.first for item in items)
        if all(start == item.end for start, item in zip(starts, items, strict=True)):
            for item in items:
                self._mirrors.setdefault(item.context, {}).pop(layer, None)
            return self._alone(session, controller, layer, items)
        if controller.is_due_alone():
            return self._alone(session, controller, layer, items)
        self._cpu_tokens += sum(item.end - start for item, start in zip(items, starts, strict=True))
        return self._together(session, controller, layer, items, starts)

    def _boundary(self, controller: Controller, layer: int, item: EvaluateItem, batch: int) -> Boundary:
        tokens, shape = item.end - item.first, item.context.shape
        per_token = _token_bytes(item)
        of_a_token = shape.layers * batch * per_token
        most = tokens if self.limit_bytes is None else _within(self.limit_bytes, of_a_token)
        chosen = controller.choose(tokens, most, per_token * batch)
        # As if all layers wanted as much: they differ little.
        self._wanted[layer] = (chosen.cpu_tokens + BLOCK_TOKENS) * of_a_token if chosen.cpu_tokens else 0
        if self._granted is not None and _within(self._granted, of_a_token) < chosen.cpu_tokens:
            chosen = controller.choose(tokens, _within(self._granted, of_a_token), per_token * batch)
        controller.boundary = chosen
        return chosen

    def _alone(
        self, session: Session, controller: Controller, layer: int, items: Sequence[EvaluateItem]
    ) -> list[Brought]:
        began = time.monotonic()
        brought = session.evaluate_and_bring(layer, items)
        controller.saw_alone(time.monotonic() - began, _rows(brought))
        self.latest = None
        return brought

    def _together(
        self,
        session: Session,
        controller: Controller,
        layer: int,
        items: Sequence[EvaluateItem],
        starts: Sequence[int],
    ) -> list[Brought]:
        mirrors = [self._mirror(layer, item, start) for item, start in zip(items, starts, strict=True)]
        host = _Host()
        began = time.monotonic()
        asked = [(at, item) for at, item in enumerate(items) if starts[at] > item.first]
        ranked = session.rank(
            layer,
            [_older(item, starts[at]) for at, item in asked],
            meanwhile=lambda: self._rank_on_cpu(host, items, starts, mirrors),
        )
        seen = time.monotonic()
        if host.error is not None:
            raise host.error
        answers = {at: answer for (at, _), answer in zip(asked, ranked, strict=True)}
        # What was asked for, as the boundary counts it: a drive that streams keys scans whole segments.
        drive_bytes = sum((starts[at] - item.first) * _token_bytes(item) for at, item in asked)
        # When it was there, not when this thread, busy with its own side, came to see it.
        answered = max((each.answered_at for each in ranked), default=0.0)
        drive_s = (answered if began < answered < seen else seen) - began
        times = Times(
            host.nbytes,
            host.ended - began,
            host.scan_s,
            drive_bytes,
            drive_s,
            sum(each.scan_s for each in ranked),
        )
        self.latest = times
        if asked:
            self._imbalance.setdefault(layer, Latest()).add(times.imbalance)
        brought = [
            self._finish(session, layer, item, mirrors[at], host.ranked[at], answers.get(at))
            for at, item in enumerate(items)
        ]
        controller.saw(times, time.monotonic() - began, _rows(brought))
        return brought

    def _mirror(self, layer: int, item: EvaluateItem, start: int) -> Mirror:
        mirror = self._mirrors.setdefault(item.context, {}).setdefault(layer, Mirror())
        if start < item.end:
            first = start // TILE_TOKENS * TILE_TOKENS
            mirror.cover(item.context, layer, first, -(-item.end // TILE_TOKENS) * TILE_TOKENS)
        return mirror

    def _rank_on_cpu(
        self, host: _Host, items: Sequence[EvaluateItem], starts: Sequence[int], mirrors: Sequence[Mirror]
    ) -> None:
        # Anew each time: it is asked again where a daemon went away.
        host.ranked, host.nbytes, host.scan_s, host.error = [], 0, 0.0, None
        try:
            for item, start, mirror in zip(items, starts, mirrors, strict=True):
                if start >= item.end or mirror.scale is None:
                    host.ranked.append(None)
                    continue
                shape = item.context.shape
                # With the sum the scale alone quantises a query: zero shifts all scores of a head alike.
                q, _, _ = kernel.quantise_query(item.query, Ranges(mirror.scale, mirror.scale), Reduction.sum)
                began = time.monotonic()
                for _ in range(self.cpu_repeats):
                    best = kernel.rank(
                        mirror.parts, q, shape.precision, start, item.end, item.k, origin=mirror.first
                    )
                host.scan_s += time.monotonic() - began
                host.ranked.append(best)
                host.nbytes += (item.end - start) * _token_bytes(item)
        except Exception as error:
            # The drive's answer must be waited for all the same.
            host.error = error
        host.ended = time.monotonic()

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
        missing = _lacking(best.ids, item.held, item.end)
        counts = [len(each) for each in missing]
        before = session.counters.read_bytes
        rows = item.context.fetch_rows(layer, missing)
        read = session.counters.read_bytes - before
        generation = mirror.generation if drive is None else drive.generation
        scanned = 0 if drive is None else drive.evaluated_bytes
        return Brought(best.ids, counts, rows, generation, scanned, read, best.scores)


def _rows(brought: Sequence[Brought]) -> int:
    return sum(sum(each.missing_per_head) for each in brought)


def _within(nbytes: int, of_a_token: int) -> int:
    # A block less for each mirror: its first tile and the flushed tokens past the range are more.
    return max(0, nbytes // of_a_token - BLOCK_TOKENS)


def _token_bytes(item: EvaluateItem) -> int:
    return item.context.shape.kv_heads * item.context.shape.key_tile_bytes // TILE_TOKENS


def _older(item: EvaluateItem, end: int) -> EvaluateItem:
    nothing = np.empty((len(item.held), 0), np.uint32)
    return item._replace(end=end, k=min(item.k, end - item.first), held=nothing)


def _lacking(ids: U32, held: U32, end: int) -> list[U32]:
    # A table is several times faster than np.isin at the thousands of ids there are here.
    has = np.zeros((len(ids), end), np.bool_)
    heads, columns = np.nonzero(held < end)
    has[heads, held[heads, columns]] = True
    known = np.take_along_axis(has, ids.astype(np.intp), axis=1)
    return [winners[~each] for winners, each in zip(ids, known, strict=True)]
