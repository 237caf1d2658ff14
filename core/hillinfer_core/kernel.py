"""The functions of :mod:`hillinfer_core.reference` in native code, the same bit for bit.

Every call checks its arguments (:class:`InvalidInput`), blocks until done, and may be made from any thread.
All but ``fit_ranges``, which is the reference's own, and ``quantise_query``, which is short, release the GIL
while they work.
Scores are computed by the widest instructions that the processor has; the environment variable
``HILLINFER_KERNEL`` (``portable``, ``avx2`` or ``avx512vnni``) forces one kind. ``rank`` and ``stream_read``,
as `places` and `moves`, use no more threads than the process may use processors, or than
``HILLINFER_KERNEL_THREADS``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _native, reference
from ._native import Cancel
from .errors import Cancelled, ConfigError, InvalidInput
from .layout import MAX_HEAD_DIM, TILE_TOKENS, Precision, Reduction, tile_bytes
from .reference import (
    F32,
    HISTOGRAM_BINS,
    I8,
    I32,
    LEAST_OFFSET,
    U8,
    U32,
    Q,
    Ranges,
    Ranked,
    fit_ranges,
)

__all__ = [
    "Cancel",
    "Ranges",
    "Ranked",
    "damaged_row",
    "data_checksums",
    "fit_ranges",
    "merge",
    "quantise_keys",
    "quantise_query",
    "rank",
    "rank_blocks",
    "row_checksums",
    "scores",
    "stream_read",
    "threads",
    "top_k",
    "variants",
    "widen_keys",
]

# The number of each is that of `Variant` in native.h; the widest last.
_VARIANTS = {"portable": 0, "avx2": 1, "avx512vnni": 2}
FORMATS = {np.dtype("float16"): 0, np.dtype("uint16"): 1, np.dtype("float32"): 2}

_FEW_THREADS = 4  # our choice: as many as copy rows in the daemon, as others compute meanwhile
_BEAT = 64  # bytes; layout.py
_MAX_THREADS = 1024
SEVERAL_THREADS_BYTES = 512 << 10
"""Bytes of keys; for less :func:`rank` takes one thread however many it may use. Our choice."""

_BLOCK_BYTES = 8 << 20  # keys of a block of rank_blocks: far more work than there is in starting it


def variants() -> list[str]:
    """Return the kinds of code that this processor can run, the widest last."""
    return [name for name, number in _VARIANTS.items() if _native.supported(number)]


_BEST = _VARIANTS[variants()[-1]]


def variant() -> int:
    """Return the number of the kind of code to run."""
    forced = _native.environment("HILLINFER_KERNEL")
    if not forced:
        return _BEST
    if forced not in variants():
        raise ConfigError(
            f"HILLINFER_KERNEL={forced} cannot run here; unset it or use one of {', '.join(variants())}"
        )
    return _VARIANTS[forced]


def threads() -> int:
    """Return how many threads a call uses at most; the caller's is one of them."""
    return _threads_asked() or len(os.sched_getaffinity(0))


def few_threads(nbytes: int, each: int, share: int = 1) -> int:
    """Return on how many threads to move ``nbytes`` of ids or rows: ``each`` or more bytes for each thread.

    There is no more than one thread for ``share`` processors.
    """
    most = min(nbytes // each, _FEW_THREADS)
    return max(min(most, threads() // share), 1) if most > 1 else 1


def code_and_threads(parts: Sequence[U8]) -> tuple[int, int]:
    """Return the kind of code that ranks keys, by its native number, and on how many threads."""
    asked = _threads_asked()
    if not asked:
        asked = threads() if sum(part.nbytes for part in parts) >= SEVERAL_THREADS_BYTES else 1
    return variant(), asked


def thread_counts() -> tuple[int, int]:
    """Return on how many threads little is ranked, and much: from :data:`SEVERAL_THREADS_BYTES` on."""
    asked = _threads_asked()
    return asked or 1, asked or threads()


def _threads_asked() -> int:
    asked = _native.environment("HILLINFER_KERNEL_THREADS")
    if not asked:
        return 0
    if not asked.isdecimal() or not 1 <= int(asked) <= _MAX_THREADS:
        raise ConfigError(f"HILLINFER_KERNEL_THREADS={asked}: unset it or use 1 to {_MAX_THREADS}")
    return int(asked)


def widen_keys(rows: npt.NDArray[Any]) -> F32:
    """Widen keys as :func:`hillinfer_core.reference.widen_keys` defines; ``rows`` are C-contiguous."""
    heads, tokens, dim = _rows_shape(rows)
    keys = np.empty((heads, tokens, dim), np.float32)
    _native.widen_keys(_flat_bytes(rows), FORMATS[rows.dtype], heads * tokens, dim, keys.reshape(-1))
    return keys


def quantise_keys(rows: npt.NDArray[Any], ranges: Ranges, precision: Precision) -> tuple[U8, int, int]:
    """Quantise keys as :func:`hillinfer_core.reference.quantise_keys` defines; ``rows`` are C-contiguous."""
    heads, tokens, dim = _rows_shape(rows)
    _require(ranges.scale.shape == ranges.zero.shape == (heads, dim), "ranges do not fit the rows")
    tiles = np.empty((heads, -(-tokens // TILE_TOKENS), tile_bytes(dim, precision)), np.uint8)
    inverse_scale = np.float32(1) / np.ascontiguousarray(ranges.scale, np.float32)
    zero = np.ascontiguousarray(ranges.zero, np.float32)
    clipped, nonfinite = _native.quantise_keys(
        _flat_bytes(rows), FORMATS[rows.dtype], tokens, zero, inverse_scale, precision.bits, tiles
    )
    return tiles, clipped, nonfinite


def quantise_query(query: F32, ranges: Ranges, reduction: Reduction) -> tuple[I8, I32, F32]:
    """Quantise ``query`` as :func:`hillinfer_core.reference.quantise_query` defines."""
    heads, dim = ranges.scale.shape
    if reduction is Reduction.none or query.dtype != np.float32 or query.ndim != 2 or query.shape[1] != dim:
        return reference.quantise_query(query, ranges, reduction)
    group, rest = divmod(query.shape[0], heads)
    if rest or group == 0:
        return reference.quantise_query(query, ranges, reduction)
    vectors = 1 if reduction is Reduction.sum else group
    q, offsets = np.empty((heads, vectors, dim), np.int8), np.empty((heads, vectors), np.int32)
    sigma = np.empty(heads, np.float32)
    finite = _native.quantise_query(
        np.ascontiguousarray(query), np.ascontiguousarray(ranges.scale, np.float32),
        np.ascontiguousarray(ranges.zero, np.float32), reduction is Reduction.sum, q, offsets, sigma,
    )  # fmt: skip
    _require(finite, "the query contains NaN or infinity, or overflows float32 when scaled")
    return q, offsets, sigma


def scores(tiles: U8, q: Q, precision: Precision, out: I32, *, offsets: I32 | None = None) -> None:
    """Score tokens as :func:`hillinfer_core.reference.scores` defines.

    ``tiles`` and ``out`` may be slices of larger arrays, as long as only the first axis is strided.
    """
    _require(tiles.dtype == np.uint8 and tiles.ndim == 3, "tiles must be uint8 [H, T, tile bytes]")
    heads, count, size = tiles.shape
    _require(size == _check_query(q, precision), f"tiles of {size} bytes do not fit a query {list(q.shape)}")
    _require(
        out.dtype == np.int32 and out.ndim == 2 and out.flags.writeable, "out must be writable int32 [H, n]"
    )
    _require(q.shape[0] == out.shape[0] == heads, "tiles, q and out differ in KV heads")
    _require(out.shape[1] >= count * TILE_TOKENS, f"out must have room for {count * TILE_TOKENS} scores")
    if heads == 0 or count == 0:
        return
    _require(tiles[0].flags.c_contiguous and out[0].flags.c_contiguous, "only the first axis may be strided")
    _native.scores(
        variant(),
        tiles,
        q if q.flags.c_contiguous else q.copy(),
        _checked_offsets(q, offsets),
        precision.bits,
        out,
    )


def top_k(scores: I32, k: int, first_id: int) -> tuple[U32, I32]:
    """Select scores as :func:`hillinfer_core.reference.top_k` defines; only the first axis may be strided."""
    _require(scores.dtype == np.int32 and scores.ndim == 2, "scores must be int32 [H, n]")
    heads, tokens = scores.shape
    _require(k >= 0, f"k cannot be negative: {k}")
    _require(first_id >= 0 and first_id + tokens <= 1 << 32, "ids must fit in 32 bits")
    shape = (heads, min(k, tokens))
    ids, chosen = np.empty(shape, np.uint32), np.empty(shape, np.int32)
    if ids.size:
        _require(scores[0].flags.c_contiguous, "only the first axis of scores may be strided")
        _native.top_k(scores, first_id, ids, chosen)
    return ids, chosen


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
    cancel: Cancel | None = None,
) -> Ranked:
    """Find the best tokens as :func:`hillinfer_core.reference.rank` defines, in one pass over the keys.

    Parts are read in place, from any memory; only their first axis may be strided. Beside the result it
    needs memory for 2 ``k`` tokens of every row, and more only where very many scores are nearly the same.
    Works on several threads (:func:`threads`), which sleep between calls; calls from several threads take
    turns. Raises :class:`Cancelled` soon after another thread calls ``cancel.set()``.
    """
    # Messages only where they are wanted: making them would cost as much as a short scan.
    size = _check_query(q, precision)
    heads = parts[0].shape[0] if len(parts) and parts[0].ndim else q.shape[0]
    tokens = 0
    for part in parts:
        _require(part.dtype == np.uint8 and part.ndim == 3, "parts must be uint8 [H, T, tile bytes]")
        if part.shape[0] != heads or part.shape[2] != size:
            raise InvalidInput(f"a part must be [{heads}, T, {size}]")
        strides = part.strides
        _require(
            part.shape[1] > 0 and strides[1:] == (size, 1), "only the first axis of parts may be strided"
        )
        tokens += part.shape[1] * TILE_TOKENS
    rows = q.shape[0]
    if heads <= 0 or rows <= 0 or rows % heads:
        raise InvalidInput(f"{rows} rows of queries for {heads} KV heads")
    if origin < 0 or origin % TILE_TOKENS:
        raise InvalidInput(f"origin must be a multiple of 16, not {origin}")
    if not origin <= first <= end <= origin + tokens <= 1 << 32:
        raise InvalidInput(f"tokens {first} to {end} are not among {origin} to {origin + tokens}")
    if k < 0:
        raise InvalidInput(f"k cannot be negative: {k}")
    shape = rows, min(k, end - first)
    ids, best = np.empty(shape, np.uint32), np.empty(shape, np.int32)
    counts = np.zeros((rows, HISTOGRAM_BINS), np.uint32) if histogram else None
    sums = np.empty((len(parts), heads), np.uint32) if checksums else None
    done = _native.rank(
        *code_and_threads(parts), parts, heads, q if q.flags.c_contiguous else q.copy(),
        _checked_offsets(q, offsets), precision.bits, origin, first, end, ids, best, counts, sums, cancel,
    )  # fmt: skip
    if not done:
        raise Cancelled("ranking was cancelled")
    return Ranked(ids, best, counts, sums)


def rank_blocks(
    parts: Iterable[U8],
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
    cancel: Cancel | None = None,
) -> Iterator[Ranked]:
    """Yield what :func:`rank` finds in one block of ``parts`` after another; :func:`merge` joins it all.

    A block is whole parts that come to 8 MiB or more. ``parts`` may be an iterator: only as much is taken
    from it as the next block needs, so merging and other work go on before all keys are there. A part must
    keep its content until its block is yielded.
    """

    def ranked() -> Ranked:
        return rank(
            block, q, precision, min(max(first, start), at), min(max(end, start), at), k,
            offsets=offsets, origin=start, histogram=histogram, checksums=checksums, cancel=cancel,
        )  # fmt: skip

    block: list[U8] = []
    start = at = origin
    for part in parts:
        block.append(part)
        at += part.shape[1] * TILE_TOKENS
        if sum(part.nbytes for part in block) >= _BLOCK_BYTES:
            yield ranked()
            block, start = [], at
    if block:
        yield ranked()
    _require(origin <= first <= end <= at, f"tokens {first} to {end} are not among {origin} to {at}")


def merge(blocks: Sequence[Ranked], k: int) -> Ranked:
    """Return the ``k`` best of ``blocks``, which ascend by token and were ranked by the same query.

    Each must be the ``k`` best of its tokens, or more of them. Histograms add up, and checksums follow one
    another, where all blocks have them.
    """
    _require(len(blocks) > 0, "nothing to merge")
    scores = np.concatenate([block.scores for block in blocks], axis=1)
    columns, best = top_k(scores, k, 0)
    ids = np.take_along_axis(np.concatenate([block.ids for block in blocks], axis=1), columns, axis=1)
    histograms = [block.histogram for block in blocks if block.histogram is not None]
    checksums = [block.checksums for block in blocks if block.checksums is not None]
    return Ranked(
        ids,
        best,
        np.sum(histograms, axis=0, dtype=np.uint32) if len(histograms) == len(blocks) else None,
        np.concatenate(checksums) if len(checksums) == len(blocks) else None,
    )


def stream_read(data: U8) -> int:
    """Return the sum, modulo 2**64, of the 64-bit words of ``data`` uint8 [a multiple of 64].

    It reads memory as fast as one can here, with the threads of ``rank``: what its rate is compared with.
    """
    _require(data.dtype == np.uint8 and data.ndim == 1 and data.size % 64 == 0, "data must be uint8 [n * 64]")
    _require(data.flags.c_contiguous, "data must be C-contiguous")
    return _native.stream_read(variant(), threads(), data)


def row_checksums(rows: npt.NDArray[Any]) -> U32:
    """Return the CRC-32C, uint32 [n], of each of ``rows`` [n, ...], C-contiguous and of any dtype."""
    _require(rows.ndim >= 2 and rows.flags.c_contiguous, "rows must be C-contiguous [n, ...]")
    out = np.empty(rows.shape[0], np.uint32)
    if out.size:
        data = _flat_bytes(rows).reshape(out.size, -1)
        _native.row_checksums(variant() != _VARIANTS["portable"], data, out)
    return out


def damaged_row(rows: U8, checksums: U32) -> int | None:
    """Return the first of ``rows`` uint8 [n, row bytes] whose :func:`row_checksums` differs, None for none.

    ``checksums`` are uint32 [n]; both are C-contiguous.
    """
    _require(rows.ndim == 2 and rows.shape[:1] == checksums.shape, "each row needs one checksum")
    at = _native.first_difference(rows, checksums, variant() != _VARIANTS["portable"])
    return None if at < 0 else at


def data_checksums(tiles: U8) -> U32:
    """Return the checksums, uint32 [H], of ``tiles`` uint8 [H, T, tile bytes].

    As :func:`hillinfer_core.reference.data_checksum` defines them. ``tiles`` may be a slice of a larger
    array, as long as only the first axis is strided; it holds one tile or more. One thread.
    """
    _require(tiles.dtype == np.uint8 and tiles.ndim == 3, "tiles must be uint8 [H, T, tile bytes]")
    _require(tiles.shape[1] > 0 and tiles.shape[2] > 0, "a checksum needs one tile or more")
    _require(tiles.shape[2] % _BEAT == 0, f"tiles must be whole beats of {_BEAT} bytes, not {tiles.shape[2]}")
    out = np.empty(tiles.shape[0], np.uint32)
    if out.size:
        _require(tiles[0].flags.c_contiguous, "only the first axis of tiles may be strided")
        _native.data_checksums(variant(), tiles, out)
    return out


def _rows_shape(rows: npt.NDArray[Any]) -> tuple[int, int, int]:
    _require(rows.dtype in FORMATS, f"rows must be float16, uint16 (bfloat16) or float32, not {rows.dtype}")
    _require(rows.ndim == 4 and rows.shape[2] == 2, f"rows must be [H, n, 2, D], not {list(rows.shape)}")
    _require(rows.flags.c_contiguous, "rows must be C-contiguous")
    heads, tokens, _, dim = rows.shape
    _require(0 < dim <= MAX_HEAD_DIM and dim % 8 == 0, f"head dimension {dim} is not supported")
    return heads, tokens, dim


def _check_query(q: npt.NDArray[Any], precision: Precision) -> int:
    """Return the bytes of the tiles that ``q`` can be scored against."""
    _require(
        q.dtype in (np.int8, np.int16) and q.ndim == 3 and q.shape[1] >= 1,
        "q must be int8 or int16 [H, R, D]",
    )
    dim = q.shape[2]
    if not 0 < dim <= MAX_HEAD_DIM or dim % 8:
        raise InvalidInput(f"head dimension {dim} is not supported")
    return tile_bytes(dim, precision)


def _checked_offsets(q: Q, offsets: I32 | None) -> I32:
    if offsets is None:
        return np.zeros(q.shape[:2], np.int32)
    _require(offsets.dtype == np.int32 and offsets.shape == q.shape[:2], "offsets must be int32 [H, R]")
    offsets = np.ascontiguousarray(offsets)
    least, most = _native.extremes(offsets)
    _require(q.dtype == np.int8 or least == most == 0, "offsets are for 8-bit queries: others may overflow")
    if least < LEAST_OFFSET or most > 0:
        raise InvalidInput(f"offsets must be {LEAST_OFFSET} to 0")
    return offsets


def _flat_bytes(array: npt.NDArray[Any]) -> U8:
    return array.reshape(-1).view(np.uint8)


def _require(held: bool, message: str) -> None:
    if not held:
        raise InvalidInput(message)
