"""Which evaluation keys are in the card's memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hillinfer_core.layout import PAGE
from hillinfer_core.reference import U8

from ..contract import KeySegment
from .buffers import Buffer


class Residency:
    """Loaded segments, ``capacity`` bytes at most; ``make`` allocates, as :class:`.buffers.Buffer` does.

    Which are loaded is decided above (``load_keys``, ``unload_keys``). Room for the work of a scan goes
    first, so :meth:`make_room` may forget a segment: it is then scanned from the pool.
    """

    def __init__(self, capacity: int, make: Callable[[int], Buffer]) -> None:
        self.capacity = capacity
        self._make = make
        self._held: dict[int, Buffer] = {}

    @property
    def used(self) -> int:
        """Bytes that loaded segments take."""
        return sum(buffer.size for buffer in self._held.values())

    def load(self, segment: KeySegment, tiles: U8) -> None:
        """Copy ``tiles`` to the card; raises ``MemoryError`` if they do not fit."""
        if tiles.shape != segment.shape or tiles.dtype != np.uint8:
            raise ValueError(f"tiles {list(tiles.shape)} are not those of a segment {list(segment.shape)}")
        self.unload(segment.offset)
        size = -(-tiles.nbytes // PAGE) * PAGE
        if self.used + size > self.capacity:
            raise MemoryError(f"{size} bytes do not fit beside {self.used} of {self.capacity}")
        buffer = self._make(size)
        buffer.view[: tiles.nbytes] = tiles.reshape(-1).data
        buffer.to_card(buffer.size)
        self._held[segment.offset] = buffer

    def unload(self, offset: int) -> None:
        """Forget the segment at ``offset``, if it is loaded."""
        buffer = self._held.pop(offset, None)
        if buffer is not None:
            buffer.close()

    def find(self, segment: KeySegment) -> Buffer | None:
        """Return the keys of ``segment`` if they are loaded."""
        return self._held.get(segment.offset)

    def make_room(self) -> bool:
        """Forget the segment that was loaded last; False if none is loaded."""
        if not self._held:
            return False
        _, buffer = self._held.popitem()
        buffer.close()
        return True

    def close(self) -> None:
        """Forget all."""
        for offset in list(self._held):
            self.unload(offset)
