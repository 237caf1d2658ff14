"""What a storage driver must do. ``tests/driver`` holds every driver to it.

A driver stores bytes at offsets and ranks tokens by their evaluation keys. What those bytes mean, which
extents are in use, and which keys are worth keeping in fast memory, is decided above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hillinfer_core.layout import TILE_TOKENS, Precision, tile_bytes
from hillinfer_core.reference import I32, U8, U32, Q

Bytes = memoryview


@dataclass(frozen=True)
class Identity:
    """What a driver drives; sizes in bytes.

    ``capacity`` of the pool; ``pool_id`` of its header, a UUID that a catalogue is bound to; ``fresh`` if the
    pool was made just now; ``direct_io`` if reads bypass the page cache; ``key_memory`` that evaluation keys
    may take where they are scanned fastest (DRAM of the host, or of the card); ``profile`` of its pacing.
    """

    driver: str
    path: str
    direct_io: bool
    capacity: int
    pool_id: str
    fresh: bool
    key_memory: int
    profile: str = "none"


@dataclass(frozen=True)
class KeySegment:
    """Evaluation keys of consecutive tokens, all KV heads, complete and never changed while in use.

    They lie at ``offset`` of the pool (a multiple of 4096, and the segment's identity) as uint8
    [kv_heads, tokens / 16, tile bytes], up to the next whole page. ``checksums`` holds the data checksum of
    each KV head (docs/evaluation.md).
    """

    offset: int
    first_token: int
    tokens: int
    kv_heads: int
    head_dim: int
    precision: Precision
    checksums: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the tiles."""
        return self.kv_heads, self.tokens // TILE_TOKENS, tile_bytes(self.head_dim, self.precision)

    @property
    def nbytes(self) -> int:
        """Bytes of the tiles, without the rest of the last page."""
        heads, tiles, size = self.shape
        return heads * tiles * size

    @property
    def end_token(self) -> int:
        """First token after those it holds."""
        return self.first_token + self.tokens


class Scan(NamedTuple):
    """Rank tokens ``first .. end - 1`` for ``q`` int8 [kv_heads, R, head_dim], and find the best ``k``.

    ``segments`` ascend and follow one another without a gap; those that hold none of the tokens are passed
    over. Of R vectors a token gets the greatest score (docs/evaluation.md); ``offsets`` are theirs, int32
    [kv_heads, R], or None for zeros. For guarantee mode ``q`` is int16
    [query_heads, 1, head_dim], and a ``histogram`` of all scores is wanted.
    """

    segments: Sequence[KeySegment]
    q: Q
    first: int
    end: int
    k: int
    histogram: bool = False
    offsets: I32 | None = None


class Winners(NamedTuple):
    """The best of a scan: ``ids`` [kv_heads, min(k, tokens)] ascending, and their ``scores``.

    ``scanned`` and ``read`` are bytes of evaluation keys: looked at, and of these brought from the drive.
    In guarantee mode heads are query heads, and there is the ``histogram``, uint32 [query_heads, 2048].
    """

    ids: U32
    scores: I32
    scanned: int
    read: int
    histogram: U32 | None = None


class RowSource(NamedTuple):
    """A pool to read rows from, of ``capacity`` bytes: ``memory`` uint8 [capacity], or the file ``fd``.

    ``direct`` and ``depth`` as :func:`hillinfer_core.transfers.gather` has them.
    """

    memory: U8 | None
    fd: int
    direct: bool
    depth: int
    capacity: int


class DamagedKeys(Exception):  # noqa: N818 -- it says what happened, as all errors here
    """The evaluation keys of ``segment``, as read for a scan, do not have the checksum they should."""

    def __init__(self, segment: KeySegment) -> None:
        super().__init__(f"evaluation keys at {segment.offset} are damaged")
        self.segment = segment


@dataclass
class Requests:
    """Read and write requests to the drive since it was opened: runs of consecutive bytes.

    What a card reads from its own drive without the host is not among them.
    """

    reads: int = 0
    writes: int = 0


class Driver(Protocol):
    """A drive of fixed capacity. Every method blocks; one thread at a time may use a driver.

    A drive that cannot serve raises ``OSError``: ``ENOSPC`` when the medium is full, ``EIO``, ``ENODEV`` or
    another when it fails. A failure whose remedy the driver knows is a
    :class:`~hillinfer_core.errors.DeviceUnavailable` that names it. Bytes never written since the last
    discard are undefined, and reading them is not an error.
    """

    @property
    def requests(self) -> Requests:
        """How many requests went to the drive; the same object all the time."""
        ...

    def identify(self) -> Identity:
        """Return what this driver drives."""
        ...

    def health(self) -> None:
        """Return if the drive answers, else raise."""
        ...

    def write(self, offset: int, data: Bytes) -> None:
        """Write all of ``data``; offset, length and memory address are multiples of 4096."""
        ...

    def flush(self) -> None:
        """Return once everything written before is safe from a loss of power."""
        ...

    def read(self, offset: int, out: Bytes) -> int:
        """Fill ``out`` from ``offset``, with no need for alignment; return the bytes read from the drive."""
        ...

    def read_ranges(self, parts: Sequence[tuple[int, Bytes]]) -> int:
        """Do as :meth:`read` for every (offset, out) of ``parts``, together; return the bytes read."""
        ...

    def gather(self, offsets: npt.NDArray[np.uint64], out: npt.NDArray[np.uint8]) -> int:
        """Read one row from each of ``offsets`` [n] into ``out`` [n, row bytes]; return the bytes read."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """Give back the space of a range whose bytes are not wanted any more; multiples of 4096."""
        ...

    def load_keys(self, segment: KeySegment, tiles: U8) -> None:
        """Keep ``tiles`` (of ``segment.shape``) in fast memory, to be scanned from there.

        The caller gives the array away and sees to :attr:`Identity.key_memory`. Raises ``MemoryError`` if
        there is no room after all; the segment is then scanned from the pool. Loading what is loaded
        replaces it.
        """
        ...

    def unload_keys(self, offset: int) -> None:
        """Forget the keys of the segment at ``offset``, if they are loaded."""
        ...

    def held_keys(self, offset: int) -> U8 | None:
        """Return the tiles of the segment at ``offset`` if they are loaded and the host itself may rank them.

        None where only :meth:`evaluate` can, or takes the time that it should. They stay what they are until
        the segment is unloaded.
        """
        ...

    def row_source(self) -> RowSource | None:
        """Return where rows may be read instead of by :meth:`gather`; None where that is not the same."""
        ...

    def evaluate(self, scan: Scan) -> Winners:
        """Carry out ``scan``, with keys in fast memory where they are loaded, and from the pool elsewhere.

        Raises :class:`DamagedKeys` for the first segment read from the pool that fails its checksum, and
        :class:`~hillinfer_core.errors.InvalidInput` for a histogram that the drive cannot make.
        """
        ...

    def close(self) -> None:
        """Release the drive; the driver cannot be used afterwards."""
        ...


__all__ = ["U8", "Bytes", "DamagedKeys", "Driver", "Identity", "KeySegment", "RowSource", "Scan", "Winners"]
