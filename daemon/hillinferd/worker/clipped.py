"""Tokens with a key element outside its range: their evaluation keys say too little of them for a bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hillinfer_core import kernel
from hillinfer_core.layout import Precision
from hillinfer_core.mass import F64, ScoreScale, clipped_tokens
from hillinfer_core.reference import F32, I32, U32, Q, Ranges, Ranked, from_tiles, quantise_keys, widen_keys

_MOST = float(np.iinfo(np.int32).max)


class ClippedTokens:
    """The clipped tokens of a layer's first :attr:`end` tokens, with their keys. Not thread-safe.

    Kept from the first evaluation that needs them on: few contexts are ever asked for a bound.
    """

    def __init__(self) -> None:
        self.end = 0
        self._generation = -1
        self._ids: list[npt.NDArray[np.int64]] = []
        self._keys: list[npt.NDArray[Any]] = []

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in (*self._ids, *self._keys))

    def begin(self, generation: int, heads: int, head_dim: int, dtype: np.dtype[Any]) -> None:
        """Forget all tokens, unless they are those of the evaluation keys of ``generation``."""
        if generation != self._generation:
            self.end, self._generation = 0, generation
            self._ids = [np.empty(0, np.int64) for _ in range(heads)]
            self._keys = [np.empty((0, head_dim), dtype) for _ in range(heads)]

    def add(self, rows: npt.NDArray[Any], ranges: Ranges, precision: Precision) -> None:
        """Look for clipped tokens in the next tokens' ``rows`` [H, n, 2, D]."""
        if kernel.quantise_keys(rows, ranges, precision)[1]:
            for head, outside in enumerate(clipped_tokens(rows, ranges, precision)):
                found = np.flatnonzero(outside)
                self._ids[head] = np.concatenate((self._ids[head], self.end + found))
                self._keys[head] = np.concatenate((self._keys[head], rows[head, found, 0]))
        self.end += rows.shape[1]

    def raised(
        self,
        ranked: Ranked,
        query: F32,
        q: Q,
        scale: ScoreScale,
        ranges: Ranges,
        precision: Precision,
        first: int,
        end: int,
    ) -> tuple[Ranked, ScoreScale]:
        """Return ``ranked`` as if each clipped token had the least score, its own or more, that bounds it.

        ``ranked`` is of tokens ``first .. end - 1`` for ``q`` [rows, 1, D], made of ``query`` [rows, D]. What
        :class:`ScoreScale` says as an upper bound then holds for clipped tokens too. The winners are exactly
        those of the scores so raised: a token that was not among the best does not get there because another
        rises.
        """
        assert ranked.histogram is not None
        ids, scores = ranked.ids.copy(), ranked.scores.copy()
        histogram, ceiling = ranked.histogram.copy(), scale.ceiling.copy()
        group = len(query) // len(self._ids)
        for head, (tokens, keys) in enumerate(zip(self._ids, self._keys, strict=True)):
            inside = slice(*np.searchsorted(tokens, (first, end)))
            if inside.start == inside.stop:
                continue
            own, wide = _levels_and_keys(keys[inside], _of_head(ranges, head), precision)
            for row in range(head * group, (head + 1) * group):
                old = own @ q[row, 0].astype(np.float64)
                with np.errstate(over="ignore"):
                    exact = _bounded(wide, query[row].astype(np.float64))
                    need = np.ceil((exact - scale.offset[row] - scale.error[row]) / scale.sigma[row])
                new = np.maximum(old, need)
                up = np.flatnonzero(new > old)
                if not len(up):
                    continue
                old, new = old[up], new[up]
                bins = np.stack((old, np.minimum(new, ceiling[row]))) - scale.low[row]
                bins = np.clip(bins // scale.width[row], 0, histogram.shape[1] - 1).astype(np.int64)
                np.subtract.at(histogram[row], bins[0], 1)
                np.add.at(histogram[row], bins[1], 1)
                ceiling[row] = max(ceiling[row], new.max())
                best = np.minimum(new, _MOST).astype(np.int32)
                ids[row], scores[row] = _merged(ids[row], scores[row], tokens[inside][up], best)
        return replace(ranked, ids=ids, scores=scores, histogram=histogram), replace(scale, ceiling=ceiling)


def _bounded(keys: F64, query: F64) -> F64:
    """Return the products, and what float64 may have lost of them: at most 256 roundings of 2**-53."""
    products: F64 = keys @ query + 1e-12 * (np.abs(keys) @ np.abs(query))
    return products


def _merged(
    ids: U32, scores: I32, raised: npt.NDArray[np.int64], risen: I32
) -> tuple[npt.NDArray[np.int64], I32]:
    """Return the best ``len(ids)`` of ``ids`` and ``raised``, where the latter's ``risen`` scores count."""
    others = ~np.isin(ids, raised)
    union = np.concatenate((ids[others].astype(np.int64), raised))
    order = np.argsort(union)
    columns, best = kernel.top_k(np.concatenate((scores[others], risen))[order][None], len(ids), 0)
    return union[order][columns[0]], best[0]


def _levels_and_keys(keys: npt.NDArray[Any], ranges: Ranges, precision: Precision) -> tuple[F64, F64]:
    rows = np.ascontiguousarray(np.stack((keys, np.zeros_like(keys)), axis=1)[None])
    tiles = quantise_keys(rows, ranges, precision)[0]
    levels = from_tiles(tiles, precision)[0, : len(keys)]
    return levels.astype(np.float64), widen_keys(rows)[0].astype(np.float64)


def _of_head(ranges: Ranges, head: int) -> Ranges:
    return Ranges(ranges.scale[head : head + 1], ranges.zero[head : head + 1])
