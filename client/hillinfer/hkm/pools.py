"""Slots and hot pool of one layer together: a selected token's row is in one of them, never in both."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from hillinfer.hkm.hot_pool import HotPool
from hillinfer.hkm.slots import Slots
from hillinfer.hkm.tensors import to_rows, to_storage

Ids = npt.NDArray[np.uint32]


class Pools:
    """Moves rows between the slots and the hot pool of a layer. Not thread-safe.

    `admit` and `fill` bring a step's selection into slots. What leaves them is kept
    aside, and offered to the hot pool by `settle` when the step's attention is on
    its way: promotion and demotion cost no step any time before its attention.
    """

    def __init__(self, slots: Slots, hot: HotPool) -> None:
        self.slots = slots
        self.hot = hot
        self._chosen: dict[tuple[int, int], Ids] = {}
        self._left: list[tuple[int, int, Ids, torch.Tensor]] = []
        self._again: set[tuple[int, int]] = set()  # admitted in more than one round of the step

    def admit(self, row: int, head: int, ids: Ids) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Give the selected `ids`, ascending and at most as many as there are slots, a slot each.

        Rows that the hot pool has are moved. Returns the ids whose rows are in
        neither, and the slots to `fill` with them.
        """
        hot = self.hot
        absent, places, left, left_places = self.slots.exchange(row, head, ids)
        self._keep_aside(row, head, left, left_places)
        found, at = hot.find(row, head, absent)
        self.fill(row, head, places[found], hot.rows[row, head, at])
        hot.release(row, head, at)
        if (row, head) in self._chosen:
            self._again.add((row, head))
        self._chosen[row, head] = ids
        return absent[~found], places[~found]

    def fill(
        self,
        row: int,
        head: int,
        places: npt.NDArray[np.int64],
        rows: npt.NDArray[np.generic] | torch.Tensor,
    ) -> None:
        """Put `rows` [n, 2, D], of the storage dtype or on the device, into the slots `places` [n]."""
        if not len(places):
            return
        kv = rows if isinstance(rows, torch.Tensor) else to_rows(rows, self.slots.keys)
        target = torch.from_numpy(places).to(kv.device)
        self.slots.keys[row, head].index_copy_(0, target, kv[:, 0])
        self.slots.values[row, head].index_copy_(0, target, kv[:, 1])

    def settle(self) -> None:
        """Count the step's selection, and keep of the rows that left the slots those worth keeping."""
        for (row, head), ids in self._chosen.items():
            self.hot.count(row, head, ids, int(self.slots.lengths[row]))
        for row, head, ids, kv in self._left:
            rows = to_storage(kv)
            if (row, head) in self._again:
                # A second round of the same step may have brought some back.
                away = ~np.isin(ids, self.slots.ids[row, head])
                ids, rows = ids[away], rows[away]
            self.hot.offer(row, head, ids, rows)
        self._chosen.clear()
        self._left.clear()
        self._again.clear()

    def _keep_aside(self, row: int, head: int, ids: Ids, places: npt.NDArray[np.int64]) -> None:
        if not self.hot.capacity or not len(ids):
            return
        target = torch.from_numpy(places).to(self.slots.keys.device)
        keys = self.slots.keys[row, head].index_select(0, target)
        values = self.slots.values[row, head].index_select(0, target)
        self._left.append((row, head, ids, torch.stack((keys, values), 1)))
