"""What the worker keeps in DRAM about a layer: where its tokens lie, row checksums, and unsealed keys."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import TILE_TOKENS, Shape
from hillinfer_core.reference import U8, U32, U64
from hillinfer_core.rows import RowPlaces, locate

from ..domain.content import LayerContent
from ..domain.placement import Placed
from ..domain.quantisation import Quantisation, SealedKeys
from ..driver.contract import KeySegment
from .clipped import ClippedTokens

Rows = npt.NDArray[Any]
Heads = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int64]


@dataclass
class Segment:
    """A placed extent and its evaluation keys.

    The keys are ``tiles`` [kv_heads, stride / 16, tile bytes] while the extent fills up, and ``sealed`` once
    they have been written to it. ``shared`` if the extent belongs to the durable context begun with.
    """

    placed: Placed
    tiles: U8 | None = None
    sealed: KeySegment | None = None
    shared: bool = False

    def seal(self, shape: Shape, keys: SealedKeys) -> None:
        """Note that the keys are in the extent."""
        self.sealed = KeySegment(
            self.placed.keys_offset(shape),
            keys.first_token,
            keys.tokens,
            shape.kv_heads,
            shape.head_dim,
            shape.precision,
            keys.checksums,
        )
        self.tiles = None

    @property
    def record(self) -> SealedKeys | None:
        """Sealed keys as the catalogue file keeps them, None while they are not sealed."""
        if self.sealed is None:
            return None
        return SealedKeys(self.sealed.first_token, self.sealed.tokens, self.sealed.checksums)


class LayerStore:
    """One layer of one context. Not thread-safe."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.tokens = 0
        self.quantisation: Quantisation | None = None
        self.segments: list[Segment] = []
        self.clipped = ClippedTokens()
        self._extents = np.empty((3, 0), np.int64)
        self._checksums: U32 = np.empty((shape.kv_heads, 0), np.uint32)

    @classmethod
    def restored(cls, shape: Shape, content: LayerContent) -> LayerStore:
        """Return the store of a durable layer; segments whose keys are not sealed are still without keys."""
        store = cls(shape)
        store.tokens, store.quantisation = content.tokens, content.quantisation
        store._checksums = content.row_checksums
        sealed = {item.first_token: item for item in content.sealed}
        segments = [Segment(placed) for placed in content.placed]
        for segment in segments:
            if segment.placed.first_token in sealed:
                segment.seal(shape, sealed[segment.placed.first_token])
        store.add_segments(segments)
        return store

    def continued(self) -> LayerStore:
        """Return a store that begins with these tokens, all of them sealed, and shares their keys."""
        if self.sealed_end < self.tokens:
            raise InvalidInput("the context to begin with is not sealed")
        store = LayerStore(self.shape)
        store.tokens, store.quantisation = self.tokens, self.quantisation
        # Not a copy: it is replaced, not written, when the new store grows.
        store._checksums = self._checksums[:, : self.tokens]
        for item in self.segments:
            if item.sealed:
                placed = replace(item.placed, tokens=item.sealed.tokens)
                store.add_segments([Segment(placed, None, item.sealed, shared=True)])
        return store

    @property
    def sealed_end(self) -> int:
        """First token after those whose keys are sealed."""
        ends = [item.sealed.end_token for item in self.segments if item.sealed]
        return max(ends, default=0)

    def add_segments(self, segments: list[Segment]) -> None:
        """Add segments after those there are; their tokens count once :attr:`tokens` is raised."""
        self.set_segments(self.segments + segments)

    def set_segments(self, segments: list[Segment]) -> None:
        """Put ``segments`` in place of those there are."""
        self.segments = segments
        placed = [segment.placed for segment in self.segments]
        extents = [(item.first_token, item.stride, item.extent.offset) for item in placed]
        self._extents = np.ascontiguousarray(np.array(extents, np.int64).reshape(-1, 3).T)

    def reserve_checksums(self, tokens: int) -> None:
        """Have room for the checksums of ``tokens`` tokens; raises ``OSError`` without memory."""
        held = self._checksums.shape[1]
        if tokens > held:
            grown = lazy((self.shape.kv_heads, max(tokens, 2 * held)), np.uint32)
            grown[:, : self.tokens] = self._checksums[:, : self.tokens]
            self._checksums = grown

    def put_checksums(self, first_token: int, checksums: U32) -> None:
        """Keep ``checksums`` [kv_heads, n] of tokens from ``first_token`` on; reserve their room before."""
        self._checksums[:, first_token : first_token + checksums.shape[1]] = checksums

    def locate(self, heads: Heads, tokens: Tokens) -> tuple[U64, U32]:
        """Return the byte offsets in the pool, uint64 [n], and checksums, uint32 [n], of rows.

        They are the rows of ``heads`` [n] and ``tokens`` [n]. The vector form of
        :meth:`hillinferd.domain.placement.Placed.row_offset`; raises :class:`InvalidInput` for tokens that
        there are not.
        """
        return locate(self.places, heads, tokens)

    @property
    def places(self) -> RowPlaces:
        """Where its rows lie."""
        return RowPlaces(self._extents, self.shape.row_bytes, self.tokens, self._checksums)

    def runs(self, first: int, end: int) -> list[tuple[Placed, int, int]]:
        """Split tokens ``first .. end - 1`` by extent: (extent, first token, end token) of each part."""
        return split([segment.placed for segment in self.segments], first, end)


def empty_tiles(shape: Shape, tokens: int) -> U8:
    """Return room for the keys of ``tokens`` tokens; its memory is taken page by page as it is filled."""
    return lazy((shape.kv_heads, tokens // TILE_TOKENS, shape.key_tile_bytes), np.uint8)


def split(placed: list[Placed], first: int, end: int) -> list[tuple[Placed, int, int]]:
    """Split tokens ``first .. end - 1`` by the extents that hold them."""
    parts = []
    for item in placed:
        low, high = max(first, item.first_token), min(end, item.end_token)
        if low < high:
            parts.append((item, low, high))
    return parts


def lazy(shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """Return a page-aligned array in a mapping of its own, all zero.

    Untouched pages cost nothing, and all of it goes back to the system when it is freed.
    """
    count = int(np.prod(shape))
    if count == 0:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, count * np.dtype(dtype).itemsize), dtype, count).reshape(shape)
