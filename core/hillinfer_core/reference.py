"""The definition of the evaluation arithmetic, in numpy: slow and clear.

:mod:`hillinfer_core.kernel` has the same functions, fast and held to these bit for bit. All arithmetic is
float32 with every operation rounded on its own (no fused multiply-add), or exact integers. H is the number of
KV heads, D the head dimension, n a number of tokens, R the query vectors for each KV head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput
from .layout import TILE_TOKENS, Precision, Reduction, tile_bytes

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
Q = npt.NDArray[np.int8] | npt.NDArray[np.int16]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

HISTOGRAM_BINS = 2048
"""Bins of a histogram of scores: 8 KiB of counters, well inside a first-level cache and two block RAMs."""

LEAST_OFFSET = -(1 << 24)
"""Least offset of a query vector. Products of 8-bit queries are within 2**23, so a vector that is farther
behind another never has the greater score: being cut off there is of no account."""

_TINY = np.finfo(np.float32).tiny
_CRC_32C = 0x82F63B78  # Castagnoli polynomial, bits reflected: RFC 3720, appendix B.4


@dataclass(frozen=True)
class Ranges:
    """What the levels of evaluation keys stand for: ``k ~ k' * scale + zero``; both are float32 [H, D]."""

    scale: F32
    zero: F32


@dataclass(frozen=True)
class Ranked:
    """The best of the tokens scanned, for each row of queries; k' is the lesser of k and the tokens.

    ``ids`` uint32 [rows, k'], ascending, and their ``scores`` int32 [rows, k']; ``histogram`` of all scores,
    uint32 [rows, 2048], and data ``checksums`` of the parts, uint32 [parts, H], where they were asked for.
    """

    ids: U32
    scores: I32
    histogram: U32 | None = None
    checksums: U32 | None = None


def widen_keys(rows: npt.NDArray[Any]) -> F32:
    """Return the keys, float32 [H, n, D], of ``rows`` [H, n, 2, D].

    Rows are float16, uint16 (the bits of bfloat16) or float32.
    """
    return _widen(rows[:, :, 0, :])


def fit_ranges(keys: F32, precision: Precision) -> Ranges:
    """Fit one range for each channel of ``keys``, float32 [H, n, D], n >= 1.

    zero is the least key, scale the range divided by the levels, and 1 for a channel that is constant (or
    varies less than float32 can divide by). Raises :class:`InvalidInput` for a key that is not finite.
    """
    if not np.isfinite(keys).all():
        raise InvalidInput("keys contain NaN or infinity")
    low = keys.min(axis=1)
    # In float64, as the range of finite float32 numbers need not be one.
    span = keys.max(axis=1).astype(np.float64) - low.astype(np.float64)
    scale = (span / precision.levels).astype(np.float32)
    return Ranges(np.where(scale < _TINY, np.float32(1), scale), low)


def quantise_keys(rows: npt.NDArray[Any], ranges: Ranges, precision: Precision) -> tuple[U8, int, int]:
    """Quantise the keys of ``rows`` [H, n, 2, D] in float16, uint16 (bfloat16) or float32.

    Returns (tiles uint8 [H, ceil(n/16), tile bytes], clipped, nonfinite): how many keys lay outside their
    range, and how many elements, of keys and values, are not finite. A level is
    clip(rint((k - zero) * (1 / scale))) with halves to even; NaN becomes 0, and so do the tokens that
    fill the last tile.
    """
    heads, tokens, _, dim = rows.shape
    inverse_scale = np.float32(1) / ranges.scale
    with np.errstate(over="ignore", invalid="ignore"):
        x = (widen_keys(rows) - ranges.zero[:, None, :]) * inverse_scale[:, None, :]
    level = np.rint(x)
    clipped = int(np.count_nonzero((level < 0) | (level > precision.levels)))
    level = np.clip(np.where(np.isnan(level), np.float32(0), level), 0, precision.levels)
    nonfinite = int(np.count_nonzero(~np.isfinite(_widen(rows))))

    tiles = -(-tokens // TILE_TOKENS)
    padded = np.zeros((heads, tiles * TILE_TOKENS, dim), np.uint8)
    padded[:, :tokens] = level.astype(np.uint8)
    return _to_tiles(padded.reshape(heads, tiles, TILE_TOKENS, dim), precision), clipped, nonfinite


def quantise_query(query: F32, ranges: Ranges, reduction: Reduction) -> tuple[I8, I32, F32]:
    """Quantise ``query``, float32 [Hq, D] where Hq is a multiple of H.

    Returns (q int8 [H, R, D], offsets int32 [H, R], sigma float32 [H]), with ``q * sigma ~ query * scale``: R
    is 1 for the sum over the query heads of a KV head, added in ascending order, and Hq / H for their
    maximum. sigma is one for each KV head, and ``offsets * sigma`` by how much ``query . zero`` of a query
    head is less than the greatest of them, so that scores of its query heads compare. Raises
    :class:`InvalidInput` for a wrong shape, or a query that is not finite once scaled, and for
    ``Reduction.none``, which is ``mass.wide_query``'s.
    """
    if reduction is Reduction.none:
        raise InvalidInput("query heads with scores of their own have 16-bit queries: mass.wide_query")
    heads, dim = ranges.scale.shape
    if query.ndim != 2 or query.shape[1] != dim or query.shape[0] == 0 or query.shape[0] % heads:
        raise InvalidInput(f"a query must be [a multiple of {heads}, {dim}], not {list(query.shape)}")
    group = query.shape[0] // heads
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = query.reshape(heads, group, dim).astype(np.float32) * ranges.scale[:, None, :]
        if reduction is Reduction.sum:
            total = scaled[:, 0]
            for member in range(1, group):
                total = total + scaled[:, member]
            scaled = total[:, None, :]
    largest = np.abs(scaled).max(axis=(1, 2))
    if not np.isfinite(largest).all():
        raise InvalidInput("the query contains NaN or infinity, or overflows float32 when scaled")
    sigma = largest / np.float32(127)
    sigma = np.where(sigma > 0, sigma, np.float32(1))
    levels = np.rint(scaled / sigma[:, None, None])
    offsets = np.zeros(scaled.shape[:2], np.int32)
    if scaled.shape[1] > 1:
        products = query.reshape(heads, group, dim).astype(np.float64) * ranges.zero[:, None, :]
        # Not sum(), which adds in an order of its own.
        shared = np.add.accumulate(products, axis=2)[:, :, -1]
        behind = (shared - shared.max(axis=1, keepdims=True)) / sigma[:, None].astype(np.float64)
        offsets = np.clip(np.rint(behind), LEAST_OFFSET, 0).astype(np.int32)
    return np.clip(levels, -127, 127).astype(np.int8), offsets, sigma


def scores(tiles: U8, q: Q, precision: Precision, out: I32, *, offsets: I32 | None = None) -> None:
    """Write the scores of ``tiles`` uint8 [H, T, tile bytes] for ``q`` [H, R, D], int8 or int16, to ``out``.

    ``out`` is int32 [H, at least T * 16]; columns from T * 16 on are left alone. A score is the dot product
    of levels plus the vector's offset, exact, and the greatest of R when R > 1. ``offsets`` int32 [H, R] are
    0 where there are none. Tokens that only fill a tile score as levels of 0 do.
    """
    levels = from_tiles(tiles, precision).astype(np.int32)
    heads, tokens, _ = levels.shape
    products = np.einsum("htd,hrd->htr", levels, q.astype(np.int32))
    if offsets is not None:
        products += offsets[:, None, :]
    out[:, :tokens] = products.max(axis=2).reshape(heads, tokens)


def top_k(scores: I32, k: int, first_id: int) -> tuple[U32, I32]:
    """Return (ids uint32, scores int32), each [H, min(k, n)]: the greatest of ``scores`` int32 [H, n].

    A score's id is ``first_id`` plus its column. Exact; of equal scores the lowest id wins. Ids ascend.
    """
    order = np.argsort(-scores.astype(np.int64), axis=1, kind="stable")
    columns = np.sort(order[:, :k], axis=1)
    return (columns + first_id).astype(np.uint32), np.take_along_axis(scores, columns, axis=1)


def rank(
    parts: Sequence[U8],
    q: Q,
    precision: Precision,
    first: int,
    end: int,
    k: int,
    *,
    offsets: I32 | None = None,
    origin: int = 0,
    histogram: bool = False,
    checksums: bool = False,
) -> Ranked:
    """Find the ``k`` best of tokens ``first`` to ``end`` - 1 for ``q``, and their scores.

    ``parts`` are evaluation keys, uint8 [H, T_i, tile bytes], of consecutive tokens; the first of them is
    token ``origin``, a multiple of 16. ``q`` [rows, R, D] is int8 or int16; rows is a multiple of H, and a KV
    head serves rows / H of them, which follow one another: 1 for the reductions sum and max, and the query
    heads of a KV head for none. ``offsets`` are int32 [rows, R], or None for zeros. Ids are token numbers. A
    checksum is of all of a part.
    """
    heads = parts[0].shape[0] if parts else q.shape[0]
    rows = [np.repeat(part, q.shape[0] // heads, axis=0) for part in parts]
    found = [np.empty((q.shape[0], part.shape[1] * TILE_TOKENS), np.int32) for part in parts]
    for part, out in zip(rows, found, strict=True):
        scores(part, q, precision, out, offsets=offsets)
    wanted = np.concatenate([np.empty((q.shape[0], 0), np.int32), *found], axis=1)[
        :, first - origin : end - origin
    ]
    ids, best = top_k(wanted, k, first)
    return Ranked(
        ids,
        best,
        _histogram(wanted, q, precision, offsets=offsets) if histogram else None,
        np.array([data_checksum(part) for part in parts], np.uint32).reshape(-1, heads)
        if checksums
        else None,
    )


def score_range(q: npt.NDArray[Any], precision: Precision, *, offsets: I32 | None = None) -> tuple[I32, U8]:
    """Return (low int32 [H], shift uint8 [H]): where the bins of a histogram lie for ``q`` [H, R, D].

    ``q`` is int8, or int16 for guarantee mode; ``offsets`` int32 [H, R], or None for zeros. low is the least
    score possible for it, and shift the smallest that brings the greatest possible into the last bin or
    below. Both follow from the query alone, so that one pass over the keys suffices and the bins of several
    scans by one query coincide.
    """
    wide = q.astype(np.int64)
    base = np.zeros(q.shape[:2], np.int64) if offsets is None else offsets.astype(np.int64)
    low = (precision.levels * np.minimum(wide, 0).sum(axis=2) + base).max(axis=1)
    high = (precision.levels * np.maximum(wide, 0).sum(axis=2) + base).max(axis=1)
    shifts = [max(0, int(span).bit_length() - HISTOGRAM_BINS.bit_length() + 1) for span in high - low]
    return low.astype(np.int32), np.array(shifts, np.uint8)


def histogram(scores: I32, q: npt.NDArray[Any], precision: Precision, *, offsets: I32 | None = None) -> U32:
    """Count ``scores`` int32 [H, n], which ``q`` [H, R, D] with ``offsets`` gave, in bins: uint32 [H, 2048].

    Bin b of a head counts the scores with ``(score - low) >> shift == b``; see :func:`score_range`.
    Tokens that only fill a tile must not be among ``scores``.
    """
    low, shift = score_range(q, precision, offsets=offsets)
    bins = (scores.astype(np.int64) - low[:, None]) >> shift[:, None].astype(np.int64)
    return np.stack([np.bincount(row, minlength=HISTOGRAM_BINS) for row in bins]).astype(np.uint32)


_histogram = histogram  # a parameter of `rank` has its name


def data_checksum(tiles: U8) -> U32:
    """Return the checksum, uint32 [H], of the evaluation keys ``tiles`` uint8 [H, T, tile bytes].

    Each of the 16 little-endian 32-bit words of a beat has two sums of its own, modulo 2**64: a adds the
    word, then b adds a, beat after beat in memory order. The checksum is the CRC-32C of the 32 sums as
    little-endian 64-bit words: a of words 0 to 15, then b. It covers whole tiles, their filling too.
    """
    heads = tiles.shape[0]
    words = np.ascontiguousarray(tiles).view("<u4").reshape(heads, -1, TILE_TOKENS)
    first: U64 = np.cumsum(words, axis=1, dtype=np.uint64)
    second: U64 = first.sum(axis=1, dtype=np.uint64)
    return row_checksums(np.stack((first[:, -1], second), axis=1).astype("<u8"))


def row_checksums(rows: npt.NDArray[Any]) -> U32:
    """Return the CRC-32C, uint32 [n], of each of ``rows`` [n, ...], C-contiguous and of any dtype."""
    data = rows.reshape(rows.shape[0], math.prod(rows.shape[1:])).view(np.uint8)
    crc = np.full(data.shape[0], 0xFFFFFFFF, np.uint32)
    for column in data.T:
        crc = (crc >> np.uint32(8)) ^ _TABLE[(crc ^ column) & np.uint32(0xFF)]
    return ~crc


def from_tiles(tiles: U8, precision: Precision) -> U8:
    """Return the levels, uint8 [H, T * 16, D], that ``tiles`` uint8 [H, T, tile bytes] hold."""
    heads, count, size = tiles.shape
    beats = tiles.reshape(heads, count, size // 64, TILE_TOKENS, 4)
    if precision is Precision.int4:
        beats = np.concatenate((beats & np.uint8(15), beats >> np.uint8(4)), axis=-1)
    return np.swapaxes(beats, 2, 3).reshape(
        heads, count * TILE_TOKENS, size * 8 // precision.bits // TILE_TOKENS
    )


def _to_tiles(levels: U8, precision: Precision) -> U8:
    """Return the tiles of ``levels`` uint8 [H, T, 16, D]."""
    heads, count, _, dim = levels.shape
    step = 32 // precision.bits
    beats = np.swapaxes(levels.reshape(heads, count, TILE_TOKENS, dim // step, step), 2, 3)
    if precision is Precision.int4:
        beats = beats[..., :4] | beats[..., 4:] << np.uint8(4)
    return np.ascontiguousarray(beats).reshape(heads, count, tile_bytes(dim, precision))


def _widen(numbers: npt.NDArray[Any]) -> F32:
    if numbers.dtype == np.uint16:
        return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.astype(np.float32)


def _crc_table() -> U32:
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = (crc >> np.uint32(1)) ^ np.where(crc & np.uint32(1), np.uint32(_CRC_32C), np.uint32(0))
    return crc


_TABLE = _crc_table()
