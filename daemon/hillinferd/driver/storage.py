"""The bytes of a pool: one file or block device, read and written with direct I/O where that works."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hillinfer_core import transfers
from hillinfer_core.errors import ConfigError, DamagedCatalogue, InvalidInput
from hillinfer_core.layout import PAGE
from hillinfer_core.reference import U8

from .block import device_bytes, discard_device, is_block_device, names_device, open_device
from .contract import Bytes, Requests, RowSource
from .header import HEADER_BYTES, Header
from .pacing import Pacing
from .patience import while_busy
from .profiles import NONE

_BOUNCE_BYTES = 1 << 20


class Storage:
    """A pool on a regular file or a formatted block device, for this process alone.

    A file that does not exist, or has no data, becomes a pool of ``capacity`` bytes, sparse; with ``keep``
    false it loses its name at once, so that its space comes back whatever happens to the process. A pool
    that exists keeps its content and its capacity, and grows where ``capacity`` asks for more (for a device
    within its size; 0 is all of it): :attr:`capacity` says what it is. With ``direct`` false, or where the
    file system does not take direct I/O, bytes go through the page cache: see :attr:`direct_io`.
    ``pacing`` makes every transfer take the time of another device. ``new_id`` is the UUID of a pool that is
    new, so that whoever keeps account of it can know it before it is there.

    Raises :class:`~hillinfer_core.errors.ConfigError` for what cannot be a pool or is in use, and what
    :meth:`.header.Header.unpack` raises; the methods are those of :class:`.contract.Driver`.

    Up to :attr:`depth` (at most 64) requests of a gather are in flight. One thread at a time; only
    :meth:`read_unpaced` of whole pages may run beside other methods.
    """

    depth = 64

    def __init__(
        self,
        path: Path,
        capacity: int,
        *,
        keep: bool,
        direct: bool = True,
        pacing: Pacing | None = None,
        new_id: str = "",
    ) -> None:
        self.path = path
        self.requests = Requests()
        self._pacing = pacing or Pacing(NONE)
        self._bounce = aligned(_BOUNCE_BYTES)
        self._fd, self._device, self.direct_io = _open(path, direct, keep)
        try:
            _claim(self._fd, path)
            self.fresh, self._header = self._prepare(capacity, keep, new_id)
            self._memory = None if self._device else _mapped(self._fd, self.capacity)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def capacity(self) -> int:
        """Bytes of the pool, the header's page included."""
        return self._header.capacity

    @property
    def pool_id(self) -> str:
        """The UUID in the pool's header."""
        return self._header.pool_id

    def fileno(self) -> int:
        """Return the descriptor, open until :meth:`close`."""
        return self._fd

    def health(self) -> None:
        """Read the header; raises ``OSError`` if that fails or it is not the pool's."""
        if self._first_page() != self._header.pack():
            error = OSError(errno.EIO, "the header of the cold pool is not what it was", str(self.path))
            raise self._gone(error)

    def write(self, offset: int, data: Bytes) -> None:
        """Write whole pages from page-aligned memory, in place and several chunks at a time."""
        if offset % PAGE or len(data) % PAGE:
            raise ValueError(f"write of {len(data)} bytes at {offset} is not whole pages")
        self._check(offset, len(data))
        if len(data):
            started = self._pacing.now()
            try:
                transfers.write_range(self._fd, offset, np.frombuffer(data, np.uint8), self.direct_io)
            except OSError as error:
                raise self._gone(error) from None
            self.requests.writes += 1
            self._pacing.append(started, len(data))

    def flush(self) -> None:
        """Return once everything written before is safe from a loss of power."""
        os.fdatasync(self._fd)

    def read(self, offset: int, out: Bytes) -> int:
        """Fill ``out``, in place where offset, length and memory are whole pages; return the bytes read."""
        return self.read_ranges([(offset, out)])

    def read_ranges(self, parts: Sequence[tuple[int, Bytes]]) -> int:
        """Read every (offset, out) of ``parts``, as one batch of requests that are in flight together."""
        targets = [(offset, np.frombuffer(out, np.uint8)) for offset, out in parts if len(out)]
        for offset, target in targets:
            self._check(offset, target.size)
        if not targets:
            return 0
        started = self._pacing.now()
        total = sum(self.read_unpaced(offset, target) for offset, target in targets)
        self._pacing.read(started, total, len(targets))
        return total

    def in_memory(self, offset: int, length: int) -> U8 | None:
        """Return a range of a pool that lies in memory anyway, not copied; None for one on a drive."""
        return None if self._memory is None else self._memory[offset : offset + length]

    def read_unpaced(self, offset: int, target: U8) -> int:
        """Read as :meth:`read` does, into uint8 [n], for an operation that is paced as a whole."""
        self._check(offset, target.size)
        self.requests.reads += 1
        if self.direct_io and (offset % PAGE or target.size % PAGE or target.ctypes.data % PAGE):
            return self._read_bounced(offset, target)
        transfers.read_range(self._fd, offset, target, self.direct_io)
        return target.size

    def gather(self, offsets: npt.NDArray[np.uint64], out: npt.NDArray[np.uint8]) -> int:
        """Read rows, many requests at a time; see :func:`hillinfer_core.transfers.gather`."""
        if len(offsets) == 0:
            return 0
        started = self._pacing.now()
        if self._memory is not None:
            try:
                transfers.copy_rows(self._memory, offsets, out)
            except InvalidInput:
                raise ValueError("a row to gather is beyond the capacity") from None
            if self._pacing.profile is not NONE:
                touching = np.count_nonzero(np.diff(np.sort(offsets)) == out.shape[1])
                self._pacing.read(started, out.size, len(offsets) - int(touching))
            return out.size
        if int(offsets.max()) + out.shape[1] > self.capacity:
            raise ValueError("a row to gather is beyond the capacity")
        total, requests = transfers.gather(self._fd, offsets, out.shape[1], out, self.direct_io, self.depth)
        self.requests.reads += requests
        self._pacing.read(started, total, requests)
        return total

    def row_source(self) -> RowSource:
        """Return where :meth:`gather` reads; good until :meth:`close`."""
        return RowSource(self._memory, self._fd, self.direct_io, self.depth, self.capacity)

    def discard(self, offset: int, length: int) -> None:
        """Give a range back; where that cannot be done its space is kept until the bytes are overwritten."""
        if offset % PAGE or length % PAGE or offset < HEADER_BYTES:
            raise ValueError(f"discard of {length} bytes at {offset} is not whole pages of content")
        self._check(offset, length)
        if not length:
            return
        try:
            (discard_device if self._device else transfers.punch_hole)(self._fd, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise self._gone(error) from None

    def close(self) -> None:
        """Close the pool; one that was not kept is gone then."""
        # A mapping keeps the file open, and with it the lock, for as long as anyone has a view of it.
        self._memory = None
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)

    def _gone(self, error: OSError) -> OSError:
        """Return ``error``, or ENODEV if the drive was pulled out: Linux calls that a full one, or EINVAL."""
        if self._device and device_bytes(self._fd) < self.capacity:
            return OSError(errno.ENODEV, os.strerror(errno.ENODEV), str(self.path))
        return error

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.capacity:
            raise ValueError(f"{length} bytes at {offset} are beyond the capacity of {self.capacity}")

    def _read_bounced(self, offset: int, target: U8) -> int:
        total, done = 0, 0
        while done < target.size:
            start = (offset + done) // PAGE * PAGE
            skip = offset + done - start
            length = min(_BOUNCE_BYTES, -(-(skip + target.size - done) // PAGE) * PAGE)
            transfers.read_range(self._fd, start, self._bounce[:length], self.direct_io)
            take = min(length - skip, target.size - done)
            target[done : done + take] = self._bounce[skip : skip + take]
            total += length
            done += take
        return total

    def _prepare(self, capacity: int, keep: bool, new_id: str) -> tuple[bool, Header]:
        """Read the header or make one; return whether the pool is new, and its header."""
        size = device_bytes(self._fd) if self._device else os.fstat(self._fd).st_size
        wanted = min(capacity or size, size) if self._device else capacity
        blank = not self._device and _is_blank(self._fd, size)
        if not keep and not blank:
            raise ConfigError(f"pool: {self.path} has content; a pool that is not kept needs a new file")
        if blank:
            if wanted <= HEADER_BYTES or wanted % PAGE:
                raise ConfigError(f"pool: a new pool cannot have {wanted} bytes; give it a capacity")
            if not keep:
                os.unlink(self.path)
            header = Header.new(wanted)
        else:
            header = self._existing(size)
        # A device is formatted with no capacity yet, which tells the first to open it that it is new.
        fresh = blank or header.capacity == HEADER_BYTES
        if blank or wanted > header.capacity:
            header = Header(new_id if fresh and new_id else header.pool_id, wanted)
            # The size first: a header never promises bytes that are not there.
            if not self._device and size < wanted:
                os.ftruncate(self._fd, wanted)
            self._write_header(header)
            if blank and keep:
                _sync_directory(self.path)
        return fresh, header

    def _existing(self, size: int) -> Header:
        page = self._first_page()
        if self._device and not any(page):
            raise ConfigError(f"pool: {self.path} is not formatted; run `hillinferctl format {self.path}`")
        header = Header.unpack(page, str(self.path))
        if size < header.capacity:
            raise DamagedCatalogue(
                f"the cold pool {self.path} is cut short: {size} bytes of {header.capacity}; restore it "
                "from a backup, or delete it and lose its contexts"
            )
        return header

    def _first_page(self) -> bytes:
        page = self._bounce[:PAGE].data
        try:
            count = os.preadv(self._fd, [page], 0)
        except OSError as error:
            self._without_direct(error)
            count = os.preadv(self._fd, [page], 0)
        return page[:count].tobytes()

    def _write_header(self, header: Header) -> None:
        page = self._bounce[:PAGE]
        page[:] = np.frombuffer(header.pack(), np.uint8)
        try:
            transfers.write_range(self._fd, 0, page, self.direct_io)
        except OSError as error:
            self._without_direct(error)
            transfers.write_range(self._fd, 0, page, False)
        os.fsync(self._fd)

    def _without_direct(self, error: OSError) -> None:
        """Give up direct I/O, which some file systems offer and then refuse; other errors go on."""
        if not self.direct_io or error.errno != errno.EINVAL:
            raise error
        _stop_direct(self._fd)
        self.direct_io = False


def _mapped(fd: int, capacity: int) -> U8 | None:
    """Map a pool on a file system that is memory, such as /dev/shm: reading it is no I/O to wait for."""
    if not transfers.is_memory(fd):
        return None
    return np.frombuffer(mmap.mmap(fd, capacity, prot=mmap.PROT_READ), np.uint8)


def aligned(nbytes: int) -> U8:
    """Return ``nbytes`` of page-aligned memory, zeros, uint8 [nbytes]; untouched pages cost nothing."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)[:nbytes]


def _open(path: Path, direct: bool, keep: bool) -> tuple[int, bool, bool]:
    """Return the descriptor, whether it is of a block device, and whether it takes direct I/O."""
    device = is_block_device(path)
    if device and not keep:
        raise ConfigError(f"pool: {path} is a block device, which always keeps its content; set keep")
    if names_device(path) and not device:
        raise ConfigError(f"pool: {path} is not there; plug the drive in, or name another")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = open_device(path, 0) if device else os.open(path, flags, 0o600)
    except OSError as error:
        raise ConfigError(f"pool: {path} cannot be opened: {error.strerror}") from None
    return fd, device, direct and _start_direct(fd)


def _start_direct(fd: int) -> bool:
    alignment = transfers.direct_alignment(fd)
    if alignment is not None and not 0 < max(alignment) <= PAGE:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _stop_direct(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


def _claim(fd: int, path: Path) -> None:
    info = os.fstat(fd)
    if not (stat.S_ISREG(info.st_mode) or stat.S_ISBLK(info.st_mode)):
        raise ConfigError(f"pool: {path} is neither a regular file nor a block device")
    try:
        while_busy(lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError:
        raise ConfigError(f"pool: {path} is in use by another daemon") from None
    # Another daemon that did not keep it may have taken its name since it was opened.
    if stat.S_ISREG(info.st_mode) and os.fstat(fd).st_nlink == 0:
        raise ConfigError(f"pool: {path} is in use by another daemon")


def _is_blank(fd: int, size: int) -> bool:
    """Return whether a file has no data: empty, or nothing but a hole (made, and then the power failed)."""
    if size == 0:
        return True
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno == errno.ENXIO
    return False


def _sync_directory(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
