"""The extent allocator: which byte ranges of the cold pool are in use."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from hillinfer_core.errors import PoolFull
from hillinfer_core.units import format_bytes

GRANULE = 64 * 1024
"""Bytes that every extent starts and ends on a multiple of: a flash-friendly unit, and 16 pages."""


@dataclass(frozen=True, order=True)
class Extent:
    """A contiguous byte range of the cold pool; both numbers are multiples of :data:`GRANULE`."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """First byte after the extent."""
        return self.offset + self.length


class ExtentAllocator:
    """First-fit allocator over ``capacity`` bytes, of which the first ``reserved`` are never handed out.

    The free list is sorted by offset and never holds two ranges that touch. Not thread-safe.
    """

    def __init__(self, capacity: int, reserved: int = 0) -> None:
        start = -(-reserved // GRANULE) * GRANULE
        end = capacity // GRANULE * GRANULE
        self._free = [Extent(start, end - start)] if end > start else []
        self._used: dict[int, Extent] = {}
        self.capacity = max(0, end - start)
        self.used_bytes = 0

    @property
    def count(self) -> int:
        """Extents in use."""
        return len(self._used)

    @property
    def free_bytes(self) -> int:
        """Bytes not in use, perhaps in several ranges."""
        return self.capacity - self.used_bytes

    def allocate(self, nbytes: int) -> Extent:
        """Return a new extent of ``nbytes`` (at least 1) rounded up to granules; raises :class:`PoolFull`."""
        if nbytes < 1:
            raise ValueError(f"cannot allocate {nbytes} bytes")
        length = -(-nbytes // GRANULE) * GRANULE
        index = next((i for i, hole in enumerate(self._free) if hole.length >= length), None)
        if index is None:
            raise PoolFull(
                f"the cold pool has no room for {format_bytes(length)}: {format_bytes(self.free_bytes)} of "
                f"{format_bytes(self.capacity)} are free; close contexts or raise pool_capacity"
            )
        hole = self._free[index]
        if hole.length == length:
            del self._free[index]
        else:
            self._free[index] = Extent(hole.offset + length, hole.length - length)
        extent = Extent(hole.offset, length)
        self._used[extent.offset] = extent
        self.used_bytes += length
        return extent

    def claim(self, extent: Extent) -> None:
        """Mark ``extent``, known from an earlier run, as in use; raises ``ValueError`` if it is not free."""
        index = bisect_left(self._free, Extent(extent.offset + 1, 0)) - 1
        hole = self._free[index] if index >= 0 else Extent(0, 0)
        if extent.length < 1 or extent.offset % GRANULE or extent.length % GRANULE or extent.end > hole.end:
            raise ValueError(f"{extent} is not free")
        before = Extent(hole.offset, extent.offset - hole.offset)
        after = Extent(extent.end, hole.end - extent.end)
        self._free[index : index + 1] = [part for part in (before, after) if part.length]
        self._used[extent.offset] = extent
        self.used_bytes += extent.length

    def free(self, extent: Extent) -> None:
        """Give ``extent`` back, joined with free neighbours; raises ``ValueError`` if it is not in use."""
        if self._used.get(extent.offset) != extent:
            raise ValueError(f"{extent} is not in use")
        del self._used[extent.offset]
        self.used_bytes -= extent.length
        index = bisect_left(self._free, extent)
        start, end = extent.offset, extent.end
        if index < len(self._free) and self._free[index].offset == end:
            end = self._free.pop(index).end
        if index > 0 and self._free[index - 1].end == start:
            index -= 1
            start = self._free.pop(index).offset
        self._free.insert(index, Extent(start, end - start))

    def free_ranges(self) -> list[Extent]:
        """Return the free ranges, ascending; for checks and status."""
        return list(self._free)
