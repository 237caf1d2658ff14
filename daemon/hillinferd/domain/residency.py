"""Which evaluation keys are in fast memory, and how much of it they take."""

from __future__ import annotations


class Residency:
    """Books of ``capacity`` bytes for evaluation keys; the rest of the keys is streamed from the pool.

    Every evaluation of a layer scans all its keys, and layers take turns: with such a cycle larger than the
    memory, replacing the least recently used would miss every time. So what is in stays in until it is
    forgotten, and what is not comes in when there is room. Keys that are not in the pool yet, because their
    extent is not full, go before all others. Not thread-safe.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.unsealed_bytes = 0
        self._loaded: dict[int, int] = {}
        self._loaded_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of keys in fast memory."""
        return self._loaded_bytes + self.unsealed_bytes

    def is_loaded(self, offset: int) -> bool:
        """Say whether the segment at ``offset`` is in."""
        return offset in self._loaded

    def admit(self, offset: int, nbytes: int) -> bool:
        """Take the segment at ``offset`` in if there is room for its ``nbytes``, and say whether it is in."""
        if offset not in self._loaded:
            if self.used_bytes + nbytes > self.capacity:
                return False
            self._loaded[offset] = nbytes
            self._loaded_bytes += nbytes
        return True

    def forget(self, offset: int) -> None:
        """Take the segment at ``offset`` out, if it is in."""
        self._loaded_bytes -= self._loaded.pop(offset, 0)

    def grow_unsealed(self, nbytes: int) -> list[int] | None:
        """Make room for ``nbytes`` more of unsealed keys; return the segments that must go out for it.

        They are forgotten here already, the latest first. None if there can never be room, with nothing
        changed.
        """
        if self.unsealed_bytes + nbytes > self.capacity:
            return None
        out = []
        while self.used_bytes + nbytes > self.capacity:
            offset, size = self._loaded.popitem()
            self._loaded_bytes -= size
            out.append(offset)
        self.unsealed_bytes += nbytes
        return out

    def shrink_unsealed(self, nbytes: int) -> None:
        """Account for ``nbytes`` of unsealed keys that are gone: sealed, or their context closed."""
        self.unsealed_bytes -= nbytes
