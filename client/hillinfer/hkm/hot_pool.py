"""Hot pool: rows of often selected tokens in DRAM, a cache of the cold pool.

The cold pool holds every token, so demotion costs nothing and promotion is a
copy of a row that is in memory anyway, as it leaves the slots. A 16-bit hit counter for each
token and KV head (paper: 2N bytes for N tokens) decides who stays.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hillinfer.hkm.slots import EMPTY
from hillinfer_core.moves import HotArrays, put_rows
from hillinfer_core.places import count_hits, keep

Ids = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]

_AGE_EVERY = 16
"""Selections of a KV head after which its hit counts are halved. Measured: docs/placement.md."""
HIT = 256
"""What a selection adds to a count, so that halves of it still tell tokens apart."""
_MAX_HITS = int(np.iinfo(np.uint16).max)


class HotPool:
    """Rows of one layer, for each sequence and KV head. Not thread-safe.

    rows: storage dtype [B, Hkv, capacity, 2 (K, V), D]; ids: uint32 [B, Hkv, capacity].
    hits: uint16 [B, Hkv, T], of the tokens 0 to T-1.
    """

    def __init__(self, batch: int, kv_heads: int, head_dim: int, dtype: npt.DTypeLike) -> None:
        self.rows: npt.NDArray[np.generic] = np.zeros((batch, kv_heads, 0, 2, head_dim), dtype)
        self.ids = np.full((batch, kv_heads, 0), EMPTY, np.uint32)
        self.hits = np.zeros((batch, kv_heads, 0), np.uint16)
        self._selections = [0] * batch
        self._note_memory()

    def _note_memory(self) -> None:
        self.nbytes = self.rows.nbytes + self.ids.nbytes + self.hits.nbytes
        """Bytes held: rows, ids and hit counters. Every step asks every layer."""
        each = zip(self.ids, self.hits, map(self.flat_rows, range(len(self.ids))), strict=True)
        self.arrays = [HotArrays.of(*arrays) for arrays in each]
        """Of each sequence."""

    @property
    def capacity(self) -> int:
        """Rows for each sequence and KV head."""
        return int(self.ids.shape[-1])

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
        if not capacity:
            self.hits = self.hits[..., :0].copy()
        self._note_memory()

    def count(self, row: int, selected: Ids, counts: Counts, tokens: int) -> None:
        """Record that `selected` ids, `counts` int64 [Hkv] of each head, were chosen of `tokens` tokens."""
        if not self.capacity:
            return
        halve = self.begin_count(row, tokens)
        hits = self.hits[row]
        count_hits(hits, selected, counts, HIT, _MAX_HITS)
        if halve:
            hits >>= 1

    def begin_count(self, row: int, tokens: int) -> bool:
        """Have counters for `tokens` tokens and a selection to count; say whether to halve them after it."""
        if tokens > self.hits.shape[-1]:
            grown = np.zeros((*self.hits.shape[:2], tokens + tokens // 8 + 64), np.uint16)
            grown[..., : self.hits.shape[-1]] = self.hits
            self.hits = grown
            self._note_memory()
        # All heads select in every step.
        self._selections[row] += 1
        return self._selections[row] % _AGE_EVERY == 0

    def crop(self, row: int, tokens: int) -> None:
        """Forget all but the first `tokens` tokens of sequence `row`: others may take their ids."""
        self.ids[row][self.ids[row] >= tokens] = EMPTY
        self.hits[row, :, tokens:] = 0

    def trim(self, tokens: int) -> None:
        """Drop the counters of all but the first `tokens` tokens."""
        if self.hits.shape[-1] > tokens:
            self.hits = self.hits[..., :tokens].copy()
            self._note_memory()

    def offer(self, row: int, ids: Ids, counts: Counts, rows: npt.NDArray[np.generic]) -> None:
        """Keep those of `rows` [n, 2, D] that were selected more often lately than what they replace.

        ids: uint32 [n], `counts` int64 [Hkv] of each head, which `count` has been told of before.
        """
        if not self.capacity or not len(ids):
            return
        which, places = keep(self.ids[row], self.hits[row], ids, counts)
        put_rows(np.ascontiguousarray(rows), which, self.flat_rows(row), places)

    def flat_rows(self, row: int) -> npt.NDArray[np.generic]:
        """Rows of sequence `row` through all heads, [Hkv * capacity, 2, D]; a view."""
        rows: npt.NDArray[np.generic] = self.rows[row].reshape(-1, *self.rows.shape[3:])
        return rows
