"""Write the shared vectors of the evaluation kernel: inputs, and what ``hillinfer_core.reference`` gives.

``python vectors.py FILE`` writes all cases; testbench.cpp reads them. All numbers are little-endian. A case
is a name (32 bytes, filled with NUL), 12 uint32 (key bits, query bits, heads, key stride in words, tiles,
begin, end, dim, vectors, k, first id, key words), then keys, queries, blocks, histograms and summaries, each
in whole 64-byte words as in evaluate.hpp.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hillinfer_core import reference
from hillinfer_core.layout import TILE_TOKENS, Precision, tile_bytes

PAIRS = 8


@dataclass(frozen=True)
class Case:
    """One launch: ``tiles`` uint8 [H or 1, T, tile bytes] and ``q`` [H, R, D] int8, or int16."""

    name: str
    precision: Precision
    tiles: npt.NDArray[np.uint8]
    q: npt.NDArray[Any]
    begin: int
    end: int
    k: int
    first_id: int = 0


def scores_of(case: Case) -> npt.NDArray[np.int32]:
    """Return the scores, int32 [H, T * 16], by exact arithmetic that also takes INT16 queries."""
    heads = case.q.shape[0]
    tiles = np.broadcast_to(case.tiles, (heads, *case.tiles.shape[1:]))
    if case.q.dtype == np.int8:
        scores = np.empty((heads, tiles.shape[1] * TILE_TOKENS), np.int32)
        reference.scores(tiles, case.q, case.precision, scores)
        return scores
    levels = reference.from_tiles(tiles, case.precision).astype(np.int64)
    products = np.einsum("htd,hrd->htr", levels, case.q.astype(np.int64)).max(axis=2)
    assert np.abs(products).max() < 2**31
    return products.astype(np.int32)


def write_case(file: BinaryIO, case: Case) -> None:
    """Append ``case`` and what it must give to ``file``."""
    heads, vectors, dim = case.q.shape
    words = case.tiles.shape[1] * case.tiles.shape[2] // 64
    file.write(case.name.encode().ljust(32, b"\0"))
    stride = words if case.tiles.shape[0] == heads else 0
    header = (
        case.precision.bits, case.q.itemsize * 8, heads, stride, case.tiles.shape[1], case.begin, case.end,
        dim, vectors, case.k, case.first_id, case.tiles.size // 64,
    )  # fmt: skip
    file.write(np.array(header, "<u4").tobytes())
    file.write(case.tiles.tobytes())
    # What fills up a query's last word is of no account, so it is not zero here.
    in_word = 64 // case.q.itemsize
    padded = np.full((heads, vectors, -(-dim // in_word) * in_word), 77, case.q.dtype)
    padded[:, :, :dim] = case.q
    file.write(padded.astype(padded.dtype.newbyteorder("<")).tobytes())

    scores = np.ascontiguousarray(scores_of(case)[:, case.begin : case.end])
    ids, best = reference.top_k(scores, case.k, case.first_id + case.begin)
    blocks = np.empty((heads, -(-ids.shape[1] // PAIRS) * PAIRS, 2), "<u4")
    blocks[:] = (0xFFFFFFFF, 0x80000000)
    blocks[:, : ids.shape[1]] = np.stack((ids, best.view(np.uint32)), axis=2)
    file.write(blocks.tobytes())
    file.write(reference.histogram(scores, case.q, case.precision).astype("<u4").tobytes())

    low, shift = reference.score_range(case.q, case.precision)
    summaries = np.zeros((heads, 16), "<u4")
    summaries[:, 1] = ids.shape[1]
    summaries[:, 2] = reference.data_checksum(case.tiles)
    summaries[:, 3] = low.view(np.uint32)
    summaries[:, 4] = shift
    summaries[:, 5] = best.min(axis=1).view(np.uint32)
    file.write(summaries.tobytes())


def cases() -> Iterator[Case]:
    """Yield every case: head dimensions, groups, ragged and offset ranges, extremes, ties, guarantee mode."""
    rng = np.random.default_rng(20240917)

    def made(
        name: str, precision: Precision, heads: int, vectors: int, dim: int,
        begin: int, end: int, k: int, **more: Any,
    ) -> Case:  # fmt: skip
        tiles = more.pop("tiles", -(-end // TILE_TOKENS))
        size = (more.pop("key_heads", heads), tiles, tile_bytes(dim, precision))
        dtype = more.pop("dtype", np.int8)
        limit = np.iinfo(dtype).max
        q = rng.integers(-limit, limit + 1, (heads, vectors, dim)).astype(dtype)
        keys = rng.integers(0, 256, size, np.uint8)
        return Case(f"{name}-{precision.value}", precision, keys, q, begin, end, k, **more)

    for precision in Precision:
        for dim in (64, 80, 96, 128, 256):
            yield made(f"dim{dim}", precision, 2, 1, dim, 0, 173, 20)
        for vectors in range(1, 9):
            yield made(f"group{vectors}", precision, 1, vectors, 64, 0, 67, 9)
        for tokens in (1, 2, 15, 16, 17, 31, 32, 33, 255):
            yield made(f"tokens{tokens}", precision, 1, 1, 8, 0, tokens, 7)
        yield made("begin-end", precision, 2, 2, 24, 5, 199, 30, first_id=1_000_000)
        yield made("begin-in-one-tile", precision, 1, 1, 24, 3, 9, 2, first_id=4096)
        yield made("begin-past-a-tile", precision, 2, 2, 24, 83, 199, 30, first_id=1_000_000)
        yield made("tiles-past-the-end", precision, 2, 1, 24, 37, 70, 9, tiles=12, first_id=16)
        yield made("one-token-of-many", precision, 1, 1, 8, 99, 100, 5, tiles=20)
        yield made("k-all", precision, 2, 1, 16, 1, 100, 99)
        yield made("k-above", precision, 1, 1, 16, 1, 100, 2**31 - 1)
        yield made("k-one", precision, 3, 1, 16, 0, 100, 1)
        yield made("many", precision, 1, 1, 16, 0, 20_011, 512)
        yield made("per-query-head", precision, 4, 1, 64, 0, 75, 10, key_heads=1)
        yield from extremes(precision)
        # 200,000 tokens: more than one launch takes.
        yield made("part1-of-2", precision, 1, 1, 8, 0, 131_072, 100)
        yield made("part2-of-2", precision, 1, 1, 8, 0, 68_928, 100, first_id=131_072)
    yield made("guarantee", Precision.int8, 4, 1, 128, 0, 300, 40, key_heads=1, dtype=np.int16)
    full = np.full((1, 3, tile_bytes(256, Precision.int8)), 255, np.uint8)
    full[:, 1] = 0
    for sign in (1, -1):
        query = np.full((1, 1, 256), sign * 32767, np.int16)
        yield Case(f"guarantee-extreme{sign}", Precision.int8, full, query, 0, 45, 20)


def extremes(precision: Precision) -> Iterator[Case]:
    """Yield the greatest and least scores, equal scores, and ties at the threshold."""
    size = tile_bytes(256, precision)
    for name, key in (("zero", 0), ("full", 255)):
        for sign in (1, -1, 0):
            keys = np.full((1, 3, size), key, np.uint8)
            query = np.full((1, 2, 256), 127 * sign, np.int8)
            yield Case(f"equal-{name}{sign}-{precision.value}", precision, keys, query, 2, 45, 20)
    # Few different scores, so that the threshold is shared by many.
    keys = np.zeros((1, 8, tile_bytes(8, precision)), np.uint8)
    keys[:, :, ::3] = 1
    query = np.array([[[1, 0, 0, -1, 0, 2, 0, 0]]], np.int8)
    for k in (1, 40, 64, 127):
        yield Case(f"ties-k{k}-{precision.value}", precision, keys, query, 0, 128, k)
    # One dense bin that has to be resolved by the lowest bits, and outliers that keep the bins wide.
    keys = np.full((1, 64, tile_bytes(256, precision)), 0x77, np.uint8)
    keys[0, :, :64] = np.random.default_rng(5).integers(0, 256, (64, 64), dtype=np.uint8)
    query = np.full((1, 1, 256), 127, np.int8)
    query[0, 0, 0], query[0, 0, 128:] = 1, -127
    yield Case(f"dense-bin-{precision.value}", precision, keys, query, 0, 1024, 300)


def main() -> None:
    """Write all cases to the file that the first argument names."""
    with open(sys.argv[1], "wb") as file:
        for case in cases():
            write_case(file, case)


if __name__ == "__main__":
    main()
