"""What a decode step of this machine is made of, each part measured alone and fitted to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
import numpy.typing as npt

from hillinfer.context import Context
from hillinfer.evaluation import EvaluateItem
from hillinfer.hkm.hot_pool import HotPool
from hillinfer.hkm.pools import Pools
from hillinfer.hkm.slots import EMPTY, Slots

Ids = npt.NDArray[np.uint32]

_FEW_TOKENS = 64


@dataclass(frozen=True)
class Asking:
    """Seconds of asking the daemon: for the turn, a token ranked, an id selected, a row brought."""

    turn: float
    token: float
    selected: float
    row: float

    def seconds(self, tokens: int, selected: int, rows: float) -> float:
        """Of one turn; ids and rows through all heads."""
        return self.turn + self.token * tokens + self.selected * selected + self.row * rows


@dataclass(frozen=True)
class Placing:
    """Seconds of a layer's `admit`, `fill` and `settle`: for a call, an id selected, and a row brought."""

    call: float
    selected: float
    row: float

    def seconds(self, selected: int, rows: float) -> float:
        """Of one layer; ids and rows through all heads."""
        return self.call + self.selected * selected + self.row * rows


class AskingTimer:
    """Times turns of four kinds; `sample` between the steps that are predicted, so both see the same load.

    Each turn is about the layer after that of the turn before, as in a step: none finds its own in caches.
    """

    def __init__(self, context: Context, query: npt.NDArray[np.float32], k: int, held: int) -> None:
        heads, past = context.shape.kv_heads, context.flushed(0)
        self._context, self._query, self._heads = context, query, heads
        self._tokens = past // 2
        self._k = max(2, min(k, self._tokens // 2))
        self._nothing = np.full((heads, max(held, self._k)), EMPTY, np.uint32)
        self._layer = 0
        self._times: list[tuple[float, float, float, float]] = []

    def _turn(self, tokens: int, k: int, held: Ids) -> tuple[float, Ids]:
        item = EvaluateItem(self._context, self._query, k, 0, tokens, held)
        began = perf_counter()
        (brought,) = self._context.session.evaluate_and_bring(self._layer, [item])
        return perf_counter() - began, brought.ids

    def _go_on(self) -> None:
        self._layer = (self._layer + 1) % self._context.shape.layers

    def sample(self) -> None:
        """Take one measurement of each kind. Blocks."""
        few, _ = self._turn(_FEW_TOKENS, 1, self._nothing)
        self._go_on()
        one, _ = self._turn(self._tokens, 1, self._nothing)
        self._go_on()
        missing, ids = self._turn(self._tokens, self._k, self._nothing)
        all_held = self._nothing.copy()
        all_held[:, : ids.shape[1]] = ids
        # Of the same layer again, when the others have been asked about meanwhile.
        for _ in range(1, self._context.shape.layers):
            self._go_on()
            self._turn(self._tokens, 1, self._nothing)
        self._go_on()
        kept, _ = self._turn(self._tokens, self._k, all_held)
        self._go_on()
        self._times.append((few, one, kept, missing))

    def result(self) -> Asking:
        """Differences of medians; those that vanish in the noise are 0."""
        few, one, kept, missing = (median(each) for each in zip(*self._times, strict=True))
        token = max(0.0, one - few) / (self._tokens - _FEW_TOKENS)
        ids = self._heads * (self._k - 1)
        return Asking(few, token, max(0.0, kept - one) / ids, max(0.0, missing - kept) / ids)


class PlacingTimer:
    """Times pools of their own, as many `layers` and of the shape of those of the steps that are predicted.

    A layer's pools are placed in after those of all others, as in a step: none finds its own in the caches.
    """

    def __init__(self, slots: Slots, hot: HotPool, layers: int) -> None:
        heads, dim, k, rows = slots.keys.shape[1], slots.keys.shape[3], slots.selected, hot.capacity
        self._heads, self._k, self._dtype = heads, max(2, k), hot.rows.dtype
        self._row = (2, dim)
        self._tokens = max(int(slots.lengths[0]), 4 * self._k)
        self._pools = [self._made(slots, self._k, rows) for _ in range(layers)]
        self._of_one = [self._made(slots, 1, rows) for _ in range(layers)]
        self._next = 0
        self._times: list[tuple[float, float, float]] = []
        self._one = self._selection()[:1]
        self._place(self._of_one, self._one)
        self._place(self._pools, self._selection())

    def _made(self, like: Slots, selected: int, rows: int) -> Pools:
        heads, dim = self._heads, self._row[1]
        pools = Pools(
            Slots(1, heads, dim, like.sinks, like.recent, like.keys), HotPool(1, heads, dim, self._dtype)
        )
        pools.slots.resize(selected)
        pools.hot.resize(rows)
        pools.slots.lengths[0] = self._tokens
        return pools

    def _place(self, layers: Sequence[Pools], ids: Ids) -> float:
        """Place in each in turn, and return the seconds of one."""
        rows = np.zeros((self._heads * len(ids), *self._row), self._dtype)
        began = perf_counter()
        for pools in layers:
            missing = pools.admit(0, [ids] * self._heads)
            pools.fill(0, missing.places, rows[: len(missing.ids)])
            pools.settle()
        return (perf_counter() - began) / len(layers)

    def _selection(self) -> Ids:
        return np.sort(np.arange(self._next, self._next + self._k) % self._tokens).astype(np.uint32)

    def sample(self) -> None:
        """Place one token that is there, as many as a step selects that are there, and half of them anew."""
        one, kept = self._place(self._of_one, self._one), self._place(self._pools, self._selection())
        self._next += self._k // 2
        self._times.append((one, kept, self._place(self._pools, self._selection())))

    def result(self) -> Placing:
        """Differences of medians; those that vanish in the noise are 0."""
        one, kept, moved = (median(each) for each in zip(*self._times, strict=True))
        selected = max(0.0, kept - one) / (self._heads * (self._k - 1))
        return Placing(one, selected, max(0.0, moved - kept) / (self._heads * (self._k // 2)))
