"""How integer scores bound attention mass: the arithmetic of guarantee mode (docs/guarantee.md).

All here is float64, over inputs that are exact in it. D is the head dimension, and a row one query head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput
from .layout import Precision
from .reference import F32, HISTOGRAM_BINS, Ranges, score_range, widen_keys

F64 = npt.NDArray[np.float64]
I16 = npt.NDArray[np.int16]

_QUERY_LEVELS = 32767
_HALF_LEVEL = 0.5 + 2.0**-12
"""Farthest that a key lies from its level: half a level, and what float32 rounds on the way to it (three
roundings of at most 2**-24 each, of numbers below 256, are below 2**-14)."""

_ROUNDING = 1e-12
"""Relative slack for float64 sums of at most 256 terms, which round by less than 256 * 2**-52."""


@dataclass(frozen=True)
class ScoreScale:
    """What the scores S of each row stand for: ``q.k <= sigma * S + offset + error``; all float64 [rows].

    For keys inside their ranges ``q.k >= sigma * S + offset - error`` too. Bin b of a row's histogram counts
    scores from ``low + b * width`` to the next bin's, and the last one up to ``ceiling``.
    """

    sigma: F64
    offset: F64
    error: F64
    low: F64
    width: F64
    ceiling: F64

    @property
    def packed(self) -> F64:
        """Return the fields in their order, float64 [rows, 6]."""
        return np.stack(
            (self.sigma, self.offset, self.error, self.low, self.width, self.ceiling), axis=1
        ).astype(np.float64)

    @classmethod
    def unpacked(cls, packed: F64) -> ScoreScale:
        """Return what :attr:`packed` gave."""
        return cls(*np.ascontiguousarray(packed.T))


def wide_query(query: F32, ranges: Ranges, precision: Precision) -> tuple[I16, ScoreScale]:
    """Quantise ``query``, float32 [rows, D], to 16 bits for keys in ``ranges``, float32 [H, D].

    Returns (q int16 [rows, 1, D], scale): each row has a sigma of its own; rows is a multiple of H, and a KV
    head serves rows / H of them, which follow one another. Raises :class:`InvalidInput` for a wrong shape, or
    a query that is not finite once scaled.
    """
    heads, dim = ranges.scale.shape
    if query.ndim != 2 or query.shape[1] != dim or query.shape[0] == 0 or query.shape[0] % heads:
        raise InvalidInput(f"a query must be [a multiple of {heads}, {dim}], not {list(query.shape)}")
    group = query.shape[0] // heads
    step, zero = (np.repeat(each, group, axis=0) for each in (ranges.scale, ranges.zero))
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = query.astype(np.float32) * step
    largest = np.abs(scaled).max(axis=1)
    if not np.isfinite(largest).all():
        raise InvalidInput("the query contains NaN or infinity, or overflows float32 when scaled")
    sigma = largest / np.float32(_QUERY_LEVELS)
    # A denormal sigma would cost precision that the error term then has to carry.
    sigma = np.where(sigma >= np.finfo(np.float32).tiny, sigma, np.float32(1))
    levels = np.clip(np.rint(scaled / sigma[:, None]), -_QUERY_LEVELS, _QUERY_LEVELS)
    q: I16 = levels.astype(np.int16)[:, None, :]

    wide, unit, least, sigma64 = (each.astype(np.float64) for each in (query, step, zero, sigma))
    # What rounding left of the query multiplies k' minus its middle, so that only half the range counts.
    rest = wide * unit - sigma64[:, None] * levels.astype(np.float64)
    middle = precision.levels / 2
    magnitude = np.abs(wide) * (np.abs(least) + precision.levels * unit)
    offset = (wide * least).sum(axis=1) + middle * rest.sum(axis=1)
    error = (
        _HALF_LEVEL * (np.abs(wide) * unit).sum(axis=1)
        + middle * np.abs(rest).sum(axis=1)
        + _ROUNDING * magnitude.sum(axis=1)
    )
    low, shift = score_range(q, precision)
    width = 2.0 ** shift.astype(np.float64)
    lowest = low.astype(np.float64)
    ceiling = lowest + HISTOGRAM_BINS * width - 1
    return q, ScoreScale(sigma64, offset, error, lowest, width, ceiling)


def clipped_tokens(rows: npt.NDArray[Any], ranges: Ranges, precision: Precision) -> npt.NDArray[np.bool_]:
    """Return which tokens of ``rows`` [H, n, 2, D] have a key element outside its range: bool [H, n].

    They are those that ``quantise_keys`` counts.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        x = (widen_keys(rows) - ranges.zero[:, None, :]) * (np.float32(1) / ranges.scale)[:, None, :]
    level = np.rint(x)
    clipped: npt.NDArray[np.bool_] = np.any((level < 0) | (level > precision.levels), axis=2)
    return clipped
