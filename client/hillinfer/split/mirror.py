"""The CPU's copy of evaluation keys of one layer: the newest tokens, whole tiles."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hillinfer.context import Context
from hillinfer_core.layout import TILE_TOKENS

U8 = npt.NDArray[np.uint8]


class Mirror:
    """Evaluation keys of tokens ``first .. end - 1`` of one layer, one generation. Not thread-safe.

    ``parts`` [kv_heads, T_i, tile bytes] follow one another. Empty when ``first == end``.
    """

    def __init__(self) -> None:
        self.parts: list[U8] = []
        self.first = self.end = self.generation = 0
        self.scale: npt.NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self.parts)

    def drop(self) -> None:
        """Hold nothing."""
        self.parts, self.scale = [], None
        self.first = self.end = 0

    def cover(self, context: Context, layer: int, first: int, end: int) -> None:
        """Hold ``first .. end - 1``, multiples of 16, or more at the end; what lacks is fetched. Blocks.

        On another generation everything is dropped and fetched anew. Raises what `Context.fetch_keys` does;
        the mirror is then empty.
        """
        if not (self.parts and self.first <= self.end and first < self.end):
            self.drop()
        try:
            if not self.parts:
                self._fetch(context, layer, first, end)
                return
            if first > self.first:
                self._cut(first)
            older = first < self.first and not self._fetch(context, layer, first, self.first, older=True)
            if older or (self.end < end and not self._fetch(context, layer, self.end, end)):
                self.drop()
                self._fetch(context, layer, first, end)
        except BaseException:
            self.drop()
            raise

    def _fetch(self, context: Context, layer: int, first: int, end: int, older: bool = False) -> bool:
        fetched = context.fetch_keys(layer, first, end)
        if self.parts and fetched.generation != self.generation:
            return False
        if not self.parts:
            self.first = first
        self.generation, self.scale = fetched.generation, fetched.scale
        self.parts = [fetched.tiles, *self.parts] if older else [*self.parts, fetched.tiles]
        self.first, self.end = min(self.first, first), max(self.end, end)
        if len(self.parts) > _PARTS:
            self.parts = [np.concatenate(self.parts, axis=1)]
        return True

    def _cut(self, first: int) -> None:
        tiles = (first - self.first) // TILE_TOKENS
        while tiles >= self.parts[0].shape[1]:
            tiles -= self.parts.pop(0).shape[1]
        if tiles:
            # A copy: a view would keep the bytes that are no longer counted.
            self.parts[0] = self.parts[0][:, tiles:].copy()
        self.first = first


_PARTS = 64  # beyond which they are joined, which copies them all
