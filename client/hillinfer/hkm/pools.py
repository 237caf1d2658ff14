"""Slots and hot pool of one layer together: a selected token's row is in one of them, never in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hillinfer.hkm.hot_pool import HIT, HotPool
from hillinfer.hkm.slots import Slots
from hillinfer.hkm.staging import Rows
from hillinfer_core.moves import turn_over
from hillinfer_core.places import Exchanged, exchange

Ids = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]


class Missing(NamedTuple):
    """Selected tokens whose rows neither slots nor hot pool have: head by head, ascending in each."""

    ids: Ids
    """uint32 [n]."""
    counts: Counts
    """int64 [Hkv], of each head."""
    places: Counts
    """int64 [n], the slots to `Pools.fill`."""


class _Left(NamedTuple):
    ids: Ids
    counts: Counts
    rows: Callable[[], npt.NDArray[np.generic]]


class _Waiting(NamedTuple):
    """What an accelerator's slots are to give away and to get from the hot pool, all at once."""

    left: _Left
    left_places: Counts
    hot_slots: Counts
    hot_rows: Rows


class Pools:
    """Moves rows between the slots and the hot pool of a layer, all KV heads at once. Not thread-safe.

    `admit` and `fill` bring a step's selection into slots. What leaves them is kept
    aside, and offered to the hot pool by `settle` when the step's attention is on
    its way: promotion and demotion cost no step any time before its attention.
    `turn_over` does all of it at once, where nothing is on its way meanwhile.
    """

    def __init__(self, slots: Slots, hot: HotPool) -> None:
        self.slots = slots
        self.hot = hot
        self._chosen: dict[int, tuple[Ids, Counts]] = {}
        self._left: list[tuple[int, _Left]] = []
        self._waiting: dict[int, _Waiting] = {}
        self._again: set[int] = set()  # sequences with more than one round of admitting in the step

    def admit(self, row: int, selected: Sequence[Ids] | Ids) -> Missing:
        """Give the `selected` ids of each head of sequence `row`, ascending, a slot each; at most all slots.

        They are [Hkv, k], or for each head as many as there are. Rows that the hot pool has are moved.
        Returns what is in neither. Raises InvalidInput for ids beyond the sequence and for more of
        them than slots.
        """
        if isinstance(selected, np.ndarray):
            wanted, counts = selected.reshape(-1), np.full(len(selected), selected.shape[1], np.int64)
        else:
            wanted, counts = np.concatenate(selected), np.array([len(ids) for ids in selected], np.int64)
        slots, hot = self.slots, self.hot
        done = exchange(slots.ids[row], hot.ids[row], wanted, counts, int(slots.lengths[row]))
        if slots.stored is not None:
            self._move_rows(row, done)
        else:
            self._wait_for_rows(row, done)
        slots.full[row] = len(wanted) == slots.ids[row].size
        if row in self._chosen:
            self._again.add(row)
        self._chosen[row] = wanted, counts
        return Missing(done.missing_ids, done.missing_counts, done.missing_places)

    def _move_rows(self, row: int, done: Exchanged) -> None:
        slots, hot = self.slots, self.hot
        if hot.capacity and len(done.left_ids):
            rows = slots.take(row, done.left_places)
            self._left.append((row, _Left(done.left_ids, done.left_counts, lambda: rows)))
        if len(done.hot_places):
            slots.put(row, done.hot_slots, Rows(hot.flat_rows(row), done.hot_places))

    def _wait_for_rows(self, row: int, done: Exchanged) -> None:
        """Have `fill` move what `admit` decides: its rows and these take one transfer to an accelerator."""
        kept = len(done.left_ids) if self.hot.capacity else 0
        rows = self.hot.flat_rows(row)
        left = _Left(done.left_ids[:kept], done.left_counts, lambda: rows[:0])
        self._waiting[row] = _Waiting(
            left, done.left_places[:kept], done.hot_slots, Rows(rows, done.hot_places)
        )

    def turn_over(
        self, row: int, selected: Ids, missing: Sequence[int], rows: npt.NDArray[np.generic]
    ) -> bool:
        """Do what `admit`, `fill` and `settle` do, of the step's only selection of sequence `row`.

        selected: uint32 [Hkv, k]; rows: [n, 2, D] of those that are `missing`, of each head. False where
        others are; then the pools are of no further use. For slots in the host's memory. Raises as `admit`.
        """
        slots, hot = self.slots, self.hot
        tokens = int(slots.lengths[row])
        halve = hot.capacity > 0 and hot.begin_count(row, tokens)
        slots.full[row] = selected.size == slots.ids[row].size
        return turn_over(
            slots.arrays[row], hot.arrays[row], selected, tokens, missing, rows, HIT, halve=halve
        )

    def fill(self, row: int, places: Counts, rows: npt.NDArray[np.generic] | torch.Tensor) -> None:
        """Put `rows` [n, 2, D], of the storage dtype or on the device, into the slots `places` [n].

        To be called after each `admit`, for what it found missing; on an accelerator the rest moves now too.
        """
        waiting = self._waiting.pop(row, None)
        if waiting is None:
            if len(places):
                self.slots.put(row, places, rows if isinstance(rows, torch.Tensor) else Rows(rows))
            return
        left, left_places, hot_slots, hot_rows = waiting
        if isinstance(rows, torch.Tensor):
            taken = self.slots.swap(row, left_places, hot_slots, [hot_rows])
            self.slots.put(row, places, rows)
        else:
            placed = np.concatenate([hot_slots, places])
            taken = self.slots.swap(row, left_places, placed, [hot_rows, Rows(rows)])
        if len(left.ids):
            self._left.append((row, left._replace(rows=taken)))

    def settle(self) -> None:
        """Count the step's selection, and keep of the rows that left the slots those worth keeping."""
        for row, (ids, counts) in self._chosen.items():
            self.hot.count(row, ids, counts, int(self.slots.lengths[row]))
        for row, left in self._left:
            ids, counts, rows = left.ids, left.counts, left.rows()
            if row in self._again:
                # A later round of the same step may have brought some back, and let them go once more.
                heads = np.repeat(np.arange(len(counts)), counts)
                here = np.concatenate([self.slots.ids[row], self.hot.ids[row]], axis=1)
                parts = np.split(ids, np.cumsum(counts)[:-1])
                away = np.concatenate([~np.isin(part, here[head]) for head, part in enumerate(parts)])
                ids, rows = ids[away], rows[away]
                counts = np.bincount(heads[away], minlength=len(counts)).astype(np.int64)
            self.hot.offer(row, ids, counts, rows)
        self.forget()

    def forget(self) -> None:
        """Drop what the step's selection left to `settle`."""
        self._chosen.clear()
        self._left.clear()
        self._waiting.clear()
        self._again.clear()
