"""Hot pool: rows of often selected tokens in DRAM, a cache of the cold pool.

The cold pool holds every token, so demotion costs nothing and promotion is a
copy of a row that is in memory anyway, as it leaves the slots. A 16-bit hit counter for each
token and KV head (paper: 2N bytes for N tokens) decides who stays.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hillinfer.hkm.slots import EMPTY

_AGE_EVERY = 16
"""Selections of a KV head after which its hit counts are halved. Measured: docs/placement.md."""
_HIT = 256
"""What a selection adds to a count, so that halves of it still tell tokens apart."""
_MAX_HITS = np.iinfo(np.uint16).max


class HotPool:
    """Rows of one layer, for each sequence and KV head. Not thread-safe.

    rows: storage dtype [B, Hkv, capacity, 2 (K, V), D]; ids: uint32 [B, Hkv, capacity].
    """

    def __init__(self, batch: int, kv_heads: int, head_dim: int, dtype: npt.DTypeLike) -> None:
        self.rows: npt.NDArray[np.generic] = np.zeros((batch, kv_heads, 0, 2, head_dim), dtype)
        self.ids = np.full((batch, kv_heads, 0), EMPTY, np.uint32)
        self._hits = np.zeros((batch, kv_heads, 0), np.uint16)
        self._selections = np.zeros((batch, kv_heads), np.int64)

    @property
    def capacity(self) -> int:
        """Rows for each sequence and KV head."""
        return int(self.ids.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes held: rows, ids and hit counters."""
        return self.rows.nbytes + self.ids.nbytes + self._hits.nbytes

    def resize(self, capacity: int) -> None:
        """Change the number of rows; those that no longer fit are dropped, the cold pool has them."""
        if capacity == self.capacity:
            return
        kept = min(capacity, self.capacity)
        rows = np.zeros((*self.ids.shape[:2], capacity, *self.rows.shape[3:]), self.rows.dtype)
        ids = np.full((*self.ids.shape[:2], capacity), EMPTY, np.uint32)
        rows[:, :, :kept] = self.rows[:, :, :kept]
        ids[:, :, :kept] = self.ids[:, :, :kept]
        self.rows, self.ids = rows, ids

    def count(self, row: int, head: int, selected: npt.NDArray[np.uint32], tokens: int) -> None:
        """Record that `selected` ids were chosen in a sequence of `tokens` tokens."""
        if not self.capacity:
            return
        if tokens > self._hits.shape[-1]:
            grown = np.zeros((*self._hits.shape[:2], tokens + tokens // 8 + 64), np.uint16)
            grown[..., : self._hits.shape[-1]] = self._hits
            self._hits = grown
        hits = self._hits[row, head]
        hits[selected] += np.minimum(_MAX_HITS - hits[selected], _HIT).astype(np.uint16)
        self._selections[row, head] += 1
        if self._selections[row, head] % _AGE_EVERY == 0:
            hits >>= 1

    def crop(self, row: int, tokens: int) -> None:
        """Forget all but the first `tokens` tokens of sequence `row`: others may take their ids."""
        self.ids[row][self.ids[row] >= tokens] = EMPTY
        self._hits[row, :, tokens:] = 0

    def find(
        self, row: int, head: int, wanted: npt.NDArray[np.uint32]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Which of `wanted` are here (bool, same length), and the places of those that are, in order."""
        ids = self.ids[row, head]
        if not ids.size:
            return np.zeros(len(wanted), np.bool_), np.zeros(0, np.int64)
        order = np.argsort(ids)
        spot = np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)
        found = ids[order[spot]] == wanted
        return found, order[spot[found]]

    def release(self, row: int, head: int, places: npt.NDArray[np.int64]) -> None:
        """Forget the rows at `places`, as `find` gave them: they are in slots now."""
        self.ids[row, head, places] = EMPTY

    def offer(self, row: int, head: int, ids: npt.NDArray[np.uint32], rows: npt.NDArray[np.generic]) -> None:
        """Keep those of `rows` [n, 2, D] that were selected more often lately than what they replace."""
        if not self.capacity or not len(ids):
            return
        mine = self.ids[row, head]
        hits = self._hits[row, head]
        worth = np.where(mine == EMPTY, -1, hits[np.where(mine == EMPTY, 0, mine)].astype(np.int64))
        count = min(len(ids), self.capacity)
        victims = np.argsort(worth, kind="stable")[:count]
        best = np.argsort(-hits[ids].astype(np.int64), kind="stable")[:count]
        # Strictly more hits: equals would take turns and throw each other out.
        better = hits[ids[best]] > worth[victims]
        victims, best = victims[better], best[better]
        mine[victims] = ids[best]
        self.rows[row, head, victims] = rows[best]
