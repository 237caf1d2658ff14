"""Reads what dm-log-writes recorded, and plays it to another drive up to any point, as after a loss of power.

Format: Documentation/admin-guide/device-mapper/log-writes.rst and drivers/md/dm-log-writes.c. Writes are in
the log in the order in which they became safe: those that no flush followed are not in it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hillinferd.driver.block import discard_device

FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8

_MAGIC = 0x6A736677736872
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")


@dataclass(frozen=True)
class Entry:
    """One request: ``data`` for ``offset``, or a range of ``length`` bytes to discard, or a mark's name."""

    flags: int
    offset: int
    length: int
    data: bytes

    @property
    def mark(self) -> str:
        """Name of the mark, empty for a request."""
        return self.data.rstrip(b"\0").decode() if self.flags & MARK else ""


def entries(log: Path) -> Iterator[Entry]:
    """Yield what ``log`` holds; the device that wrote it must have been removed."""
    with log.open("rb", buffering=0) as file:
        magic, version, count, sector = _SUPER.unpack_from(file.read(4096))
        assert (magic, version) == (_MAGIC, 1), f"no log on {log}"
        position = sector
        for _ in range(count):
            file.seek(position)
            head = file.read(sector)
            first, number, flags, data_length = _ENTRY.unpack_from(head)
            position += sector
            data = b""
            if flags & MARK:
                data = head[_ENTRY.size : _ENTRY.size + data_length]
            elif not flags & DISCARD:
                data = file.read(number * sector)
                position += number * sector
            yield Entry(flags, first * sector, number * sector, data)


class Replay:
    """A drive that entries are applied to."""

    def __init__(self, device: Path) -> None:
        self._fd = os.open(device, os.O_RDWR)

    def apply(self, entry: Entry) -> None:
        """Carry out one entry."""
        if entry.flags & DISCARD:
            discard_device(self._fd, entry.offset, entry.length)
        elif not entry.flags & MARK and entry.data:
            assert os.pwrite(self._fd, entry.data, entry.offset) == len(entry.data)

    def apply_torn(self, entry: Entry, random: np.random.Generator) -> None:
        """Carry out a random part of a write: each sector of it may have reached the drive or not."""
        if not entry.data or entry.flags & MARK:
            return
        for start in range(0, len(entry.data), 512):
            if random.random() < 0.5:
                os.pwrite(self._fd, entry.data[start : start + 512], entry.offset + start)

    def sync(self) -> None:
        """Let other descriptors see what was applied."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Release the drive."""
        os.close(self._fd)
