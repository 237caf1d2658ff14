"""The kernel's job done with numpy, torch and numba: scores of every token, then the best k of each head.

All start from the levels that the kernel starts from, unpacked from its tiles to plain rows: uint8 [H, n, D],
or [H, n, D / 2] for INT4, dimension d in the low and d + D / 2 in the high nibble. Each uses all processors,
where it can, and the fastest exact arithmetic found for it: float32 holds these scores (at most 8.3 million)
exactly, `torch.mv` on int8 would wrap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hillinfer_core.layout import Precision

Winners = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""Ids and scores, each [H, k], in any order."""

Peer = Callable[[npt.NDArray[np.uint8], npt.NDArray[np.int8], int], Winners]
"""Takes rows, the query int8 [H, D] and k; made for one precision."""


def rows_of(levels: npt.NDArray[np.uint8], precision: Precision) -> npt.NDArray[np.uint8]:
    """Return the rows of `levels`, uint8 [H, n, D]."""
    if precision is Precision.int8:
        return levels
    half = levels.shape[2] // 2
    return levels[:, :, :half] | levels[:, :, half:] << np.uint8(4)


def numpy_peer(precision: Precision) -> Peer:
    """Return the peer in numpy: float32 products in blocks that fit a cache, then argpartition."""

    def run(rows: npt.NDArray[np.uint8], q: npt.NDArray[np.int8], k: int) -> Winners:
        heads, tokens, _ = rows.shape
        query = q.astype(np.float32)
        scores = np.empty((heads, tokens), np.float32)
        block = 4096
        for head in range(heads):
            for at in range(0, tokens, block):
                part = rows[head, at : at + block]
                if precision is Precision.int4:
                    part = np.concatenate((part & np.uint8(15), part >> np.uint8(4)), axis=1)
                scores[head, at : at + block] = part.astype(np.float32) @ query[head]
        ids = np.argpartition(scores, tokens - k, axis=1)[:, tokens - k :]
        return ids, np.take_along_axis(scores, ids, axis=1)

    return run


def torch_peer(precision: Precision) -> Peer | None:
    """Return the peer in torch: `torch._int_mm` on signed bytes, then `topk`; None without torch."""
    try:
        import torch
    except ModuleNotFoundError:
        return None

    def scores_of(rows: torch.Tensor, query: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        if precision is Precision.int4:
            levels = torch.cat((rows & 15, rows >> 4), dim=1).view(torch.int8)
            return torch._int_mm(levels, query)[:, 0]
        # Signed bytes are wanted: the level less 128, whose share of every score is the same.
        return torch._int_mm((rows ^ 128).view(torch.int8), query)[:, 0] + 128 * total

    def run(rows: npt.NDArray[np.uint8], q: npt.NDArray[np.int8], k: int) -> Winners:
        keys, queries = torch.from_numpy(rows), torch.from_numpy(q)
        totals = queries.sum(dim=1, dtype=torch.int32)
        scores = torch.stack(
            [scores_of(keys[head], queries[head, :, None], totals[head]) for head in range(len(rows))]
        )
        best, ids = scores.topk(k, dim=1, sorted=False)
        return ids.numpy(), best.numpy()

    return run


def numba_peer(precision: Precision) -> Peer | None:
    """Return the peer in numba: compiled loops over heads and tokens, threshold by a histogram; or None."""
    try:
        import numba
    except ModuleNotFoundError:
        return None
    from hillinfer.bench import numba_loops

    del numba
    score = numba_loops.score_int8 if precision is Precision.int8 else numba_loops.score_int4

    def run(rows: npt.NDArray[np.uint8], q: npt.NDArray[np.int8], k: int) -> Winners:
        scores = np.empty(rows.shape[:2], np.int32)
        score(rows, q, scores)
        ids = np.empty((len(rows), k), np.uint32)
        best = np.empty((len(rows), k), np.int32)
        numba_loops.select(scores, ids, best)
        return ids, best

    return run


PEERS: Mapping[str, Callable[[Precision], Peer | None]] = {
    "numpy": numpy_peer,
    "torch": torch_peer,
    "numba": numba_peer,
}
