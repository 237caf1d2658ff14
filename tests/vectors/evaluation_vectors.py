"""Shared test vectors of evaluation: inputs, and what ``hillinfer_core.reference`` gives for them.

Every implementation is held to them: the native kernel in all its variants (tests/core), the HLS kernel in C
simulation (hls/test) and its arithmetic in RTL simulation (hls/rtl).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hillinfer_core import reference
from hillinfer_core.layout import TILE_TOKENS, Precision, tile_bytes


@dataclass(frozen=True)
class Case:
    """One request: ``tiles`` uint8 [key heads, T, tile bytes] and ``q`` [rows, R, D] int8, or int16.

    ``offsets`` are int32 [rows, R], or None for zeros.
    The tokens ``begin`` to ``end`` - 1 of ``tiles`` are ranked; the id of its first token is ``first_id``, a
    multiple of 16.
    """

    name: str
    precision: Precision
    tiles: npt.NDArray[np.uint8]
    q: npt.NDArray[Any]
    begin: int
    end: int
    k: int
    first_id: int = 0
    offsets: npt.NDArray[np.int32] | None = None

    def expected(self) -> reference.Ranked:
        """Return what the definition gives, with histogram and checksums [1, key heads]."""
        first, end = self.first_id + self.begin, self.first_id + self.end
        return reference.rank(
            [self.tiles], self.q, self.precision, first, end, self.k,
            offsets=self.offsets, origin=self.first_id, histogram=True, checksums=True,
        )  # fmt: skip


class Maker:
    """Makes cases of random keys and queries that are the same each time."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(
        self, name: str, precision: Precision, rows: int, vectors: int, dim: int, begin: int, end: int,
        k: int, *, key_heads: int | None = None, dtype: Any = np.int8, first_id: int = 0, tiles: int = 0,
    ) -> Case:  # fmt: skip
        """Return a case of ``tiles`` tiles, or as many as ``end`` tokens need.

        Several 8-bit vectors have offsets of the size of their scores, so that each of them wins some.
        """
        limit = np.iinfo(dtype).max
        q = self._rng.integers(-limit, limit + 1, (rows, vectors, dim)).astype(dtype)
        size = (key_heads or rows, tiles or -(-end // TILE_TOKENS), tile_bytes(dim, precision))
        keys = self._rng.integers(0, 256, size, np.uint8)
        offsets = None
        if vectors > 1 and q.dtype == np.int8:
            spread = limit * precision.levels * int(dim**0.5)
            offsets = self._rng.integers(-spread, 1, (rows, vectors)).astype(np.int32)
        return Case(f"{name}-{precision.value}", precision, keys, q, begin, end, k, first_id, offsets)


DIMS = (32, 64, 80, 96, 128, 256)
GROUPS = range(1, 9)
TOKENS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129)


def cases() -> Iterator[Case]:
    """Yield every case: head dimensions, groups, ragged and offset ranges, extremes, ties, guarantee mode."""
    made = Maker(20240917)
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
    # The greatest scores with the least offsets: the second vector never wins, the third ties with the first.
    keys = np.full((1, 3, size), 255, np.uint8)
    query = np.full((1, 3, 256), -127, np.int8)
    query[0, 1] = 127
    offsets = np.array([[0, reference.LEAST_OFFSET, 0]], np.int32)
    yield Case(f"offset-least-{precision.value}", precision, keys, query, 0, 48, 9, 0, offsets)
    every = np.full((1, 3), reference.LEAST_OFFSET, np.int32)
    yield Case(f"offset-every-{precision.value}", precision, keys, query, 0, 48, 9, 0, every)
    # Keys of zeros: the offsets alone decide.
    keys = np.zeros((1, 3, size), np.uint8)
    offsets = np.array([[-7, -3, -5]], np.int32)
    yield Case(f"offset-alone-{precision.value}", precision, keys, query, 0, 48, 9, 0, offsets)
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


def grid() -> Iterator[Case]:
    """Yield every head dimension with every group, as reduction maximum, with ragged numbers of tokens."""
    made = Maker(20261123)
    number = 0
    for precision in Precision:
        for dim in DIMS:
            for group in GROUPS:
                tokens = TOKENS[number % len(TOKENS)]
                number += 1
                yield made(f"d{dim}-g{group}-n{tokens}", precision, 1, group, dim, 0, tokens, number % 40 + 1)


def large() -> Iterator[Case]:
    """Yield cases of up to 200,000 tokens, which take a simulation too long."""
    made = Maker(3)
    for precision in Precision:
        for tokens, dim, k in ((200_000, 64, 4000), (65_537, 128, 1311), (8191, 256, 8190), (4097, 80, 1)):
            yield made(f"n{tokens}", precision, 2, 1, dim, 3, tokens, k)
        yield made("n30000-g7", precision, 1, 7, 96, 0, 30_000, 300)
        yield made("n20000-per-query-head", precision, 6, 1, 64, 7, 20_000, 200, key_heads=2)
        yield made("n20000-k-above", precision, 1, 1, 32, 0, 20_000, 30_000)
        # All scores equal: nothing tells tokens apart but their ids.
        equal = np.full((2, 12_500, tile_bytes(64, precision)), 0x33, np.uint8)
        query = np.full((2, 1, 64), -127, np.int8)
        yield Case(f"n200000-equal-{precision.value}", precision, equal, query, 1, 199_999, 2621)
    yield made("n50000-guarantee", Precision.int8, 4, 1, 128, 0, 50_000, 500, key_heads=1, dtype=np.int16)
