"""Where the tokens of a layer lie: a layer is a list of placed extents, each covering a run of tokens.

An extent holds rows, then evaluation keys. Rows lie head by head, so that the rows of one head are
contiguous and a page of direct I/O brings neighbours of the same head: the row of token ``t`` and head ``h``
is at ``offset + (h * stride + t - first_token) * row_bytes``. The keys begin on the page after the last row,
and are written once, when the extent is full or its context is saved: uint8 [kv_heads, tokens / 16, tile
bytes].
"""

from __future__ import annotations

from dataclasses import dataclass

from hillinfer_core.errors import PoolFull
from hillinfer_core.layout import PAGE, TILE_TOKENS, Shape

from .extents import Extent, ExtentAllocator

FIRST_TOKENS = 256
"""Tokens of the first extent of a layer, and of the smallest. A multiple of every append unit, 16 to 128."""

LARGEST_TOKENS = 4096
"""Tokens of the largest extent: 16 MiB of rows for 8 heads of 512-byte rows."""


@dataclass(frozen=True)
class Placed:
    """An extent that holds tokens ``first_token .. first_token + tokens - 1`` of one layer, all heads.

    ``stride`` is the tokens it was laid out for; ``tokens`` is less where a context goes on from a saved one
    that did not fill its last extent.
    """

    first_token: int
    tokens: int
    extent: Extent
    stride: int

    @property
    def end_token(self) -> int:
        """First token after those it can hold."""
        return self.first_token + self.tokens

    def row_offset(self, head: int, token: int, row_bytes: int) -> int:
        """Return the byte offset in the pool of the row of ``head`` and ``token``."""
        return self.extent.offset + (head * self.stride + token - self.first_token) * row_bytes

    def keys_offset(self, shape: Shape) -> int:
        """Return the byte offset in the pool of the evaluation keys; a multiple of 4096."""
        return self.extent.offset + shape.kv_heads * self.stride * shape.row_bytes


def keys_bytes(shape: Shape, tokens: int) -> int:
    """Return the bytes of the evaluation keys of ``tokens`` tokens, all heads, in whole pages."""
    exact = shape.kv_heads * (tokens // TILE_TOKENS) * shape.key_tile_bytes
    return -(-exact // PAGE) * PAGE


def extent_bytes(shape: Shape, tokens: int) -> int:
    """Return the bytes of an extent for ``tokens`` tokens (a multiple of 256)."""
    return shape.kv_heads * tokens * shape.row_bytes + keys_bytes(shape, tokens)


def next_tokens(covered: int) -> int:
    """Return the tokens that the next extent of a layer covers: 256, 256, 512, 1024, 2048, 4096, 4096, ..."""
    largest = min(covered, LARGEST_TOKENS)
    return max(FIRST_TOKENS, largest // FIRST_TOKENS * FIRST_TOKENS)


def extend(allocator: ExtentAllocator, shape: Shape, covered: int, needed: int) -> list[Placed]:
    """Allocate extents that take a layer from ``covered`` tokens to at least ``needed``; all or nothing.

    Where the pool is too fragmented for the usual size, halves are tried down to 256 tokens. Raises
    :class:`PoolFull` with nothing allocated.
    """
    placed: list[Placed] = []
    try:
        while covered < needed:
            tokens = next_tokens(covered)
            while True:
                try:
                    extent = allocator.allocate(extent_bytes(shape, tokens))
                    break
                except PoolFull:
                    if tokens == FIRST_TOKENS:
                        raise
                    # Whole steps: a layer that had to make do before has no power of two to halve.
                    tokens = max(FIRST_TOKENS, tokens // 2 // FIRST_TOKENS * FIRST_TOKENS)
            placed.append(Placed(covered, tokens, extent, tokens))
            covered += tokens
    except PoolFull:
        for item in placed:
            allocator.free(item.extent)
        raise
    return placed
