"""Where the rows of a layer lie: a layer is a list of placed extents, each covering a run of tokens.

Inside an extent rows lie head by head, so that the rows of one head are contiguous and a page of direct I/O
brings neighbours of the same head: the row of token ``t`` and head ``h`` is at
``offset + (h * tokens + t - first_token) * row_bytes``.
"""

from __future__ import annotations

from dataclasses import dataclass

from hillinfer_core.errors import PoolFull
from hillinfer_core.layout import Shape

from .extents import Extent, ExtentAllocator

FIRST_TOKENS = 256
"""Tokens of the first extent of a layer, and of the smallest. A multiple of every append unit, 16 to 128."""

LARGEST_TOKENS = 4096
"""Tokens of the largest extent: 16 MiB for 8 heads of 512-byte rows."""


@dataclass(frozen=True)
class Placed:
    """An extent that holds tokens ``first_token .. first_token + tokens - 1`` of one layer, all heads."""

    first_token: int
    tokens: int
    extent: Extent

    @property
    def end_token(self) -> int:
        """First token after those it can hold."""
        return self.first_token + self.tokens

    def row_offset(self, head: int, token: int, row_bytes: int) -> int:
        """Return the byte offset in the pool of the row of ``head`` and ``token``."""
        return self.extent.offset + (head * self.tokens + token - self.first_token) * row_bytes


def next_tokens(covered: int) -> int:
    """Return the tokens that the next extent of a layer covers: 256, 256, 512, 1024, 2048, 4096, 4096, ..."""
    return min(max(FIRST_TOKENS, covered), LARGEST_TOKENS)


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
                    extent = allocator.allocate(shape.kv_heads * tokens * shape.row_bytes)
                    break
                except PoolFull:
                    if tokens == FIRST_TOKENS:
                        raise
                    # Whole steps: a layer that had to make do before has no power of two to halve.
                    tokens = max(FIRST_TOKENS, tokens // 2 // FIRST_TOKENS * FIRST_TOKENS)
            placed.append(Placed(covered, tokens, extent))
            covered += tokens
    except PoolFull:
        for item in placed:
            allocator.free(item.extent)
        raise
    return placed
