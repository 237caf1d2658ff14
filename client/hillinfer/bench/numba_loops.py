"""The loops of the numba peer; importing this needs numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

Array = Any

BLOCK = 4096
BINS = 2048


@numba.njit(parallel=True, cache=True)  # type: ignore[untyped-decorator, unused-ignore]
def score_int8(rows: Array, q: Array, scores: Array) -> None:
    """Write the scores of `rows` uint8 [H, n, D] for `q` int8 [H, D] to int32 [H, n]."""
    heads, tokens, dim = rows.shape
    blocks = (tokens + BLOCK - 1) // BLOCK
    for job in numba.prange(heads * blocks):
        head, start = job // blocks, job % blocks * BLOCK
        for token in range(start, min(start + BLOCK, tokens)):
            total = np.int32(0)
            for d in range(dim):
                total += np.int32(rows[head, token, d]) * np.int32(q[head, d])
            scores[head, token] = total


@numba.njit(parallel=True, cache=True)  # type: ignore[untyped-decorator, unused-ignore]
def score_int4(rows: Array, q: Array, scores: Array) -> None:
    """Write the scores of packed `rows` uint8 [H, n, D / 2] for `q` int8 [H, D] to int32 [H, n]."""
    heads, tokens, half = rows.shape
    blocks = (tokens + BLOCK - 1) // BLOCK
    for job in numba.prange(heads * blocks):
        head, start = job // blocks, job % blocks * BLOCK
        for token in range(start, min(start + BLOCK, tokens)):
            total = np.int32(0)
            for d in range(half):
                pair = np.int32(rows[head, token, d])
                total += (pair & 15) * np.int32(q[head, d]) + (pair >> 4) * np.int32(q[head, half + d])
            scores[head, token] = total


@numba.njit(parallel=True, cache=True)  # type: ignore[untyped-decorator, unused-ignore]
def select(scores: Array, ids: Array, best: Array) -> None:
    """Write the k best of each head to `ids` and `best` [H, k], ties to the lowest id."""
    heads, tokens = scores.shape
    k = ids.shape[1]
    for head in numba.prange(heads):
        row = scores[head]
        low, high = row.min(), row.max()
        width = (np.int64(high) - low) // BINS + 1
        counts = np.zeros(BINS, np.int64)
        for token in range(tokens):
            counts[(np.int64(row[token]) - low) // width] += 1
        bin_, above = BINS - 1, counts[BINS - 1]
        while above < k:
            bin_ -= 1
            above += counts[bin_]
        floor = low + bin_ * width
        members = np.sort(row[(row >= floor) & (row < floor + width)])
        wanted = k - (above - counts[bin_])
        threshold = members[len(members) - wanted]
        ties = wanted - np.sum(members > threshold)
        filled = 0
        for token in range(tokens):
            score = row[token]
            if score < threshold or (score == threshold and ties == 0):
                continue
            ties -= score == threshold
            ids[head, filled] = token
            best[head, filled] = score
            filled += 1
