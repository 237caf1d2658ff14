"""Guarantee mode: attend to as many tokens as a share of the attention takes (docs/guarantee.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from hillinfer.apart import ApartItem
from hillinfer.hkm.query import ExactQuery
from hillinfer.hkm.share import Shares
from hillinfer.report import MassReport
from hillinfer_core.layout import Precision
from hillinfer_core.mass import F64
from hillinfer_core.reference import HISTOGRAM_BINS

if TYPE_CHECKING:
    from hillinfer.hkm.cache import HierarchicalCache
    from hillinfer.hkm.layer import HierarchicalLayer

_FIRST_CANDIDATES = 256
"""Candidates that a layer's first step asks for; later ones half as many again as the step before took."""

_ROUNDS = 6
"""Rankings and fetches of one step before all tokens are attended; with exact queries two do. Our choice."""

_STREAM_ABOVE = 0.5
"""Share of the tokens above which all of them are streamed in order instead of picked. Our choice."""

_SLOT_STEP = 32  # slots by which a layer's selection grows

Ids = npt.NDArray[np.uint32]


@dataclass
class LayerMass:
    """What a layer's decode steps attended to, and held of the attention.

    A step's share is that of its worst query head. attended: tokens, mean over
    sequences and KV heads, pinned ones included, summed over the steps; whole:
    steps in which every token was attended.
    """

    steps: int = 0
    attended: float = 0.0
    whole: int = 0
    share_sum: float = 0.0
    share_least: float = 1.0


@dataclass
class MassTally:
    """What guarantee mode reached. sound: shares are lower bounds, else they are estimates."""

    target: float
    sound: bool
    layers: list[LayerMass] = field(default_factory=list)
    last: dict[int, F64] = field(default_factory=dict)
    """The latest step's share of each layer, float64 [B, H]."""


class Guarantee:
    """Decode steps of one cache that hold `target` of the attention. Not thread-safe."""

    def __init__(self, cache: HierarchicalCache, target: float) -> None:
        sound = cache.config.precision is Precision.int8 and isinstance(cache.predictor, ExactQuery)
        self.tally = MassTally(target, sound, [LayerMass() for _ in cache.full_layers])
        self._guess = [_FIRST_CANDIDATES] * len(cache.full_layers)

    def report(self) -> MassReport:
        """Return what was reached so far."""
        tally = self.tally
        steps = sum(each.steps for each in tally.layers)
        return MassReport(
            tally.target,
            "bound" if tally.sound else "estimate",
            min(each.share_least for each in tally.layers) if steps else None,
            sum(each.share_sum for each in tally.layers) / steps if steps else None,
            tuple(each.attended / max(1, each.steps) for each in tally.layers),
            tuple(each.whole / max(1, each.steps) for each in tally.layers),
        )

    def select(self, layer: HierarchicalLayer, query: torch.Tensor, scaling: float) -> bool:
        """Fill the layer's slots for `query` [B, H, 1, D]; False if all tokens must be attended instead.

        Blocks: one turn of the stream and one fetch, as a rule.
        """
        step = _Step(layer, query, scaling, self.tally.sound)
        if step.rows:
            k = min(self._guess[layer.index], step.most)
            if not self._reach(step, k):
                self._count(layer, None)
                return False
            taken = max(len(ids) for heads in step.wanted for ids in heads)
            self._guess[layer.index] = max(_FIRST_CANDIDATES, -(-taken * 3 // 2 // 32) * 32)
        wanted = sum(len(ids) for heads in step.wanted for ids in heads)
        layer.cache.count_selected(wanted, step.brought)
        self._count(layer, step)
        return True

    def _reach(self, step: _Step, k: int) -> bool:
        if k < 1:
            return False
        step.rank(k)
        growing = True
        for _ in range(_ROUNDS):
            counts = step.least(self.tally.target, growing)
            if max(int(each.max()) for each in counts) > k:
                k = max(2 * k, step.candidates(self.tally.target))
                if k > step.most:
                    return False
                step.rank(k)
                continue
            if not step.fetch(counts):
                return False
            if not self.tally.sound or step.share.min() >= self.tally.target:
                return True
            # What was fetched weighs less than was thought: now count on nothing that is not there.
            growing = False
        return False

    def _count(self, layer: HierarchicalLayer, step: _Step | None) -> None:
        told, slots = self.tally.layers[layer.index], layer.slots
        told.steps += 1
        if step is None:
            told.whole += 1
            told.attended += float(slots.lengths.mean())
            told.share_sum += 1.0
            self.tally.last.pop(layer.index, None)
            return
        selected = [len(ids) for heads in step.wanted for ids in heads]
        told.attended += float(np.minimum(slots.lengths, slots.pinned).mean())
        told.attended += sum(selected) / (len(slots.lengths) * slots.keys.shape[1])
        least = float(step.share.min())
        told.share_sum += least
        told.share_least = min(told.share_least, least)
        self.tally.last[layer.index] = step.share


class _Step:
    """One step of one layer: what was ranked, what is wanted and what the slots hold of the attention."""

    def __init__(self, layer: HierarchicalLayer, query: torch.Tensor, scaling: float, sound: bool) -> None:
        slots = layer.slots
        self._layer, self._scaling, self._sound = layer, scaling, sound
        batch, heads, _, dim = query.shape
        self._kv_heads = slots.keys.shape[1]
        self._folded = query.reshape(batch, self._kv_heads, heads // self._kv_heads, dim).double()
        self._exact = query[:, :, 0].float().cpu().numpy()
        self._tokens = [max(int(n) - slots.pinned, 0) for n in slots.lengths]
        self.rows = [row for row, tokens in enumerate(self._tokens) if tokens]
        self.wanted: list[list[Ids]] = [
            [np.empty(0, np.uint32) for _ in range(self._kv_heads)] for _ in range(batch)
        ]
        self.share: F64 = np.ones((batch, heads))
        self._shares: dict[int, Shares] = {}
        self.brought = 0
        if self.rows:
            self._weight = self._weigh(slots.pinned)

    @property
    def most(self) -> int:
        """Most candidates to ask for."""
        heads = self._exact.shape[1]
        session = self._layer.cache.session
        arena: int = session.arena_bytes // (8 * heads * len(self.rows)) - HISTOGRAM_BINS
        tokens = int(_STREAM_ABOVE * min(self._tokens[row] for row in self.rows))
        return max(0, min(arena, tokens))

    def rank(self, k: int) -> None:
        """Have `k` candidates for every query head."""
        layer, cache = self._layer, self._layer.cache
        ranking = cache.predictor.ranking_query(layer.index, self._exact)
        first = layer.slots.sinks
        items = [
            ApartItem(cache.contexts[row], ranking[row], k, first, first + self._tokens[row])
            for row in self.rows
        ]
        for row, found in zip(self.rows, cache.session.rank_apart(layer.index, items), strict=True):
            self._shares[row] = Shares(
                found, self._tokens[row], self._scaling, layer.softcap, sound=self._sound
            )

    def least(self, target: float, growing: bool) -> list[npt.NDArray[np.int64]]:
        """For each sequence, how many candidates every query head needs."""
        return [
            self._shares[row].least(self._weight[row], target, growing=growing, has=self._has(row))
            for row in self.rows
        ]

    def candidates(self, target: float) -> int:
        """How many candidates to ask for, where there were too few."""
        return max(self._shares[row].candidates(self._weight[row], target) for row in self.rows)

    def fetch(self, counts: Sequence[npt.NDArray[np.int64]]) -> bool:
        """Bring what `counts` say besides what is there, and weigh it; False if there is no room for it."""
        for row, needed in zip(self.rows, counts, strict=True):
            ids = self._shares[row].ids
            group = len(ids) // self._kv_heads
            for head in range(self._kv_heads):
                members = range(head * group, (head + 1) * group)
                parts = [ids[member, : needed[member]] for member in members]
                self.wanted[row][head] = np.unique(np.concatenate([self.wanted[row][head], *parts]))
        if not _make_room(self._layer, max(len(ids) for heads in self.wanted for ids in heads)):
            return False
        for row in self.rows:
            self._place(row)
        self._weight = self._weigh(self._layer.slots.keys.shape[2])
        for row in self.rows:
            self.share[row] = self._shares[row].held(self._weight[row], self._has(row))
        return True

    def _place(self, row: int) -> None:
        layer, pools = self._layer, self._layer.pools
        missing = pools.admit(row, self.wanted[row])
        of_heads = np.split(missing.ids, np.cumsum(missing.counts)[:-1])
        rows = layer.cache.contexts[row].fetch_rows(layer.index, of_heads)
        pools.fill(row, missing.places, rows)
        self.brought += len(missing.ids)

    def _has(self, row: int) -> npt.NDArray[np.bool_]:
        """Which candidates the slots hold."""
        ids = self._shares[row].ids
        group = len(ids) // self._kv_heads
        return np.stack([np.isin(ids[at], self.wanted[row][at // group]) for at in range(len(ids))])

    def _weigh(self, places: int) -> F64:
        """Log of the exact weight of the first `places` slots that hold a token, float64 [B, H]."""
        slots = self._layer.slots
        visible = slots.visible()
        scores = self._folded @ slots.keys[:, :, :places].double().transpose(-1, -2) * self._scaling
        if (cap := self._layer.softcap) is not None:
            scores = torch.tanh(scores / cap) * cap
        if visible is not None:
            scores = scores.masked_fill(~visible[:, :, None, :places], float("-inf"))
        weight: F64 = torch.logsumexp(scores, -1).flatten(1).cpu().numpy()
        return weight


def _make_room(layer: HierarchicalLayer, selected: int) -> bool:
    """Have slots for `selected` tokens, within the resident budget of all layers; False if it cannot be."""
    cache, slots = layer.cache, layer.slots
    # Not resized at every step: what is selected swings.
    fits = selected <= slots.selected <= 2 * selected + _SLOT_STEP
    size = slots.selected if fits else -(-selected // _SLOT_STEP) * _SLOT_STEP
    others = [each for each in cache.full_layers if each.is_initialized and each is not layer]
    division = cache.divide_among(slots, size + sum(each.slots.selected for each in others))
    if not division.keep_slots:
        for each in others:
            each.forget_selection()
        division = cache.divide_among(slots, size)
        if not division.keep_slots:
            return False
    for each in (layer, *others):
        held = each.hot.capacity
        grows = each is layer and division.hot_rows > held + held // 8
        if division.hot_rows < held or grows:
            each.hot.resize(division.hot_rows)
    slots.resize(size)
    return True
