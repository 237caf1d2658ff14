"""What the worker keeps in DRAM about a layer: evaluation keys, their ranges, and row checksums."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hillinfer_core import kernel
from hillinfer_core.layout import TILE_TOKENS, Shape
from hillinfer_core.reference import U8, U32, Ranges

from ..domain.placement import Placed

Rows = npt.NDArray[Any]
U64 = npt.NDArray[np.uint64]


@dataclass
class Segment:
    """The evaluation keys of one placed extent: ``tiles`` [kv_heads, tokens / 16, tile bytes]."""

    placed: Placed
    tiles: U8

    @classmethod
    def empty(cls, placed: Placed, shape: Shape) -> Segment:
        """Return a segment without keys; its memory is taken page by page as it is filled."""
        tiles = _lazy((shape.kv_heads, placed.tokens // TILE_TOKENS, shape.key_tile_bytes), np.uint8)
        return cls(placed, tiles)


@dataclass(frozen=True)
class Keys:
    """Evaluation keys made with one set of ranges.

    ``fitted_tokens`` had their keys looked at to fit the ranges; of the key elements of ``later_tokens``,
    quantised since, ``clipped`` lay outside them.
    """

    ranges: Ranges
    fitted_tokens: int
    later_tokens: int = 0
    clipped: int = 0


class LayerStore:
    """One layer of one context. Not thread-safe."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.tokens = 0
        self.generation = 0
        self.keys: Keys | None = None
        self.segments: list[Segment] = []
        self._starts = np.empty(0, np.int64)
        self._spans = np.empty(0, np.int64)
        self._bases = np.empty(0, np.int64)
        self._checksums: U32 = np.empty((shape.kv_heads, 0), np.uint32)

    def add_segments(self, segments: list[Segment]) -> None:
        """Add segments after those there are; their tokens count once :attr:`tokens` is raised."""
        self.segments.extend(segments)
        placed = [segment.placed for segment in self.segments]
        self._starts = np.array([item.first_token for item in placed], np.int64)
        self._spans = np.array([item.tokens for item in placed], np.int64)
        self._bases = np.array([item.extent.offset for item in placed], np.int64)

    def put_checksums(self, first_token: int, checksums: U32) -> None:
        """Keep ``checksums`` [kv_heads, n] of tokens from ``first_token`` on."""
        end = first_token + checksums.shape[1]
        held = self._checksums.shape[1]
        if end > held:
            grown = _lazy((self.shape.kv_heads, max(end, 2 * held)), np.uint32)
            grown[:, :first_token] = self._checksums[:, :first_token]
            self._checksums = grown
        self._checksums[:, first_token:end] = checksums

    def checksums(self, heads: npt.NDArray[np.intp], tokens: npt.NDArray[np.int64]) -> U32:
        """Return the checksums, uint32 [n], of the rows of ``heads`` [n] and ``tokens`` [n]."""
        found: U32 = self._checksums[heads, tokens]
        return found

    def offsets(self, heads: npt.NDArray[np.intp], tokens: npt.NDArray[np.int64]) -> U64:
        """Return the byte offsets in the pool, uint64 [n], of the rows of ``heads`` [n] and ``tokens`` [n].

        The vector form of :meth:`hillinferd.domain.placement.Placed.row_offset`.
        """
        index = np.searchsorted(self._starts, tokens, side="right") - 1
        rows = heads * self._spans[index] + tokens - self._starts[index]
        offsets: U64 = (self._bases[index] + rows * self.shape.row_bytes).astype(np.uint64)
        return offsets

    def runs(self, first: int, end: int) -> list[tuple[Placed, int, int]]:
        """Split tokens ``first .. end - 1`` by extent: (extent, first token, end token) of each part."""
        return split([segment.placed for segment in self.segments], first, end)

    def score(self, q: npt.NDArray[np.int8], first: int, end: int, out: npt.NDArray[np.int32]) -> int:
        """Score the tiles that cover tokens ``first .. end - 1``; return the bytes of keys scanned.

        ``out`` int32 [kv_heads, at least the tokens of those tiles] starts at the first tile's first token.
        """
        scanned, origin = 0, first // TILE_TOKENS
        for segment in self.segments:
            start = segment.placed.first_token // TILE_TOKENS
            low = max(origin, start)
            high = min(-(-end // TILE_TOKENS), start + segment.tiles.shape[1])
            if low < high:
                part = segment.tiles[:, low - start : high - start]
                columns = slice((low - origin) * TILE_TOKENS, (high - origin) * TILE_TOKENS)
                kernel.scores(part, q, self.shape.precision, out[:, columns])
                scanned += part.size
        return scanned


def put_tiles(segments: list[Segment], first_token: int, tiles: U8) -> None:
    """Copy ``tiles`` [kv_heads, n / 16, tile bytes] of tokens from ``first_token`` on to their segments."""
    end = first_token + tiles.shape[1] * TILE_TOKENS
    for segment in segments:
        start = segment.placed.first_token
        low, high = max(first_token, start), min(end, segment.placed.end_token)
        if low < high:
            source = tiles[:, (low - first_token) // TILE_TOKENS : (high - first_token) // TILE_TOKENS]
            segment.tiles[:, (low - start) // TILE_TOKENS : (high - start) // TILE_TOKENS] = source


def split(placed: list[Placed], first: int, end: int) -> list[tuple[Placed, int, int]]:
    """Split tokens ``first .. end - 1`` by the extents that hold them."""
    parts = []
    for item in placed:
        low, high = max(first, item.first_token), min(end, item.end_token)
        if low < high:
            parts.append((item, low, high))
    return parts


def _lazy(shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
    # A mapping of its own: untouched pages cost nothing, and all of it goes back to the system when freed.
    count = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, count * np.dtype(dtype).itemsize), dtype, count).reshape(shape)
