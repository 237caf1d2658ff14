"""What a storage driver must do. ``tests/driver`` holds every driver to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Bytes = memoryview


@dataclass(frozen=True)
class Identity:
    """What a driver drives. ``capacity`` in bytes; ``direct_io`` says whether reads bypass the page cache."""

    driver: str
    path: str
    direct_io: bool
    capacity: int


class Driver(Protocol):
    """A drive of fixed capacity. Every method blocks; one thread at a time may use a driver.

    A drive that cannot serve raises ``OSError``: ``ENOSPC`` when the medium is full, anything else when it
    fails. Bytes never written since the last discard are undefined, and reading them is not an error.
    """

    def identify(self) -> Identity:
        """Return what this driver drives."""
        ...

    def health(self) -> None:
        """Return if the drive answers, else raise ``OSError``."""
        ...

    def write(self, offset: int, data: Bytes) -> None:
        """Write all of ``data``; offset, length and memory address are multiples of 4096."""
        ...

    def read(self, offset: int, out: Bytes) -> int:
        """Fill ``out`` from ``offset``, with no need for alignment; return the bytes read from the drive."""
        ...

    def gather(self, offsets: npt.NDArray[np.uint64], out: npt.NDArray[np.uint8]) -> int:
        """Read one row from each of ``offsets`` [n] into ``out`` [n, row bytes]; return the bytes read."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """Give back the space of a range whose bytes are not wanted any more; multiples of 4096."""
        ...

    def close(self) -> None:
        """Release the drive; the driver cannot be used afterwards."""
        ...
