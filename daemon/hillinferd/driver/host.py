"""The host driver: the cold pool is a sparse file, read and written with direct I/O where that works."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hillinfer_core import kernel
from hillinfer_core.errors import ConfigError
from hillinfer_core.layout import PAGE

from .contract import Bytes, Identity

HEADER_BYTES = PAGE
"""Bytes at the start of the file that hold :data:`MAGIC` and never rows."""

MAGIC = b"hillinfer cold pool 1\n"

_BOUNCE_BYTES = 1 << 20


class HostDriver:
    """Drives a regular file of ``capacity`` bytes (a multiple of 4096), created sparse.

    With ``keep_name`` false the file loses its name at once, so that its space comes back whatever happens to
    the process. A file with content that is no cold pool is refused with :class:`ConfigError`, as is one that
    another process drives. What the file held is discarded. With ``direct`` false, or where the file system
    does not offer it, bytes go through the page cache.
    """

    def __init__(self, path: Path, capacity: int, *, keep_name: bool, direct: bool = True) -> None:
        self._path = path
        self._capacity = capacity
        self._fd, self._direct = _open(path, direct)
        try:
            _claim(self._fd, path)
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, capacity)
            self._bounce = mmap.mmap(-1, _BOUNCE_BYTES)
            self._bounce[: len(MAGIC)] = MAGIC
            self.write(0, memoryview(self._bounce)[:HEADER_BYTES])
            if not keep_name:
                os.unlink(path)
        except BaseException:
            os.close(self._fd)
            raise

    def identify(self) -> Identity:
        """Return path, capacity and whether the file system takes direct I/O."""
        return Identity("host", str(self._path), self._direct, self._capacity)

    def health(self) -> None:
        """Read the header; raises ``OSError`` if that fails or it is not there."""
        header = bytearray(len(MAGIC))
        self.read(0, memoryview(header))
        if header != MAGIC:
            raise OSError(errno.EIO, "the header of the cold pool is gone", str(self._path))

    def write(self, offset: int, data: Bytes) -> None:
        """Write all of ``data``; see :class:`~hillinferd.driver.contract.Driver`."""
        if offset % PAGE or len(data) % PAGE:
            raise ValueError(f"write of {len(data)} bytes at {offset} is not whole pages")
        if offset + len(data) > self._capacity:
            raise ValueError(f"write of {len(data)} bytes at {offset} is beyond the capacity")
        while data:
            done = os.pwrite(self._fd, data, offset)
            # A short direct write may end off a page: repeat the page that it tore.
            done -= done % PAGE
            if done == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            data, offset = data[done:], offset + done

    def read(self, offset: int, out: Bytes) -> int:
        """Fill ``out``; through an aligned buffer when direct I/O could not reach it in place."""
        if offset + len(out) > self._capacity:
            raise ValueError(f"read of {len(out)} bytes at {offset} is beyond the capacity")
        if not self._direct or not (offset % PAGE or len(out) % PAGE or _address(out) % PAGE):
            self._fill(offset, out)
            return len(out)
        total, done = 0, 0
        while done < len(out):
            start = (offset + done) // PAGE * PAGE
            skip = offset + done - start
            length = min(_BOUNCE_BYTES, -(-(skip + len(out) - done) // PAGE) * PAGE)
            with memoryview(self._bounce)[:length] as bounce:
                self._fill(start, bounce)
                take = min(length - skip, len(out) - done)
                out[done : done + take] = bounce[skip : skip + take]
            total += length
            done += take
        return total

    def gather(self, offsets: npt.NDArray[np.uint64], out: npt.NDArray[np.uint8]) -> int:
        """Read scattered rows with the native thread pool, whole pages at a time under direct I/O."""
        if len(offsets) == 0:
            return 0
        if int(offsets.max()) + out.shape[1] > self._capacity:
            raise ValueError("a row to gather is beyond the capacity")
        return kernel.gather(self._fd, offsets, out.shape[1], out, self._direct)

    def discard(self, offset: int, length: int) -> None:
        """Punch a hole; a file system without holes keeps the space until the bytes are overwritten."""
        try:
            kernel.punch_hole(self._fd, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise

    def close(self) -> None:
        """Give the file's space back and close it; a named file keeps its header."""
        try:
            os.ftruncate(self._fd, HEADER_BYTES)
        finally:
            os.close(self._fd)

    def _fill(self, offset: int, out: Bytes) -> None:
        while out:
            done = os.preadv(self._fd, [out], offset)
            if self._direct:
                done -= done % PAGE
            if done == 0:
                raise OSError(errno.EIO, f"short read at {offset}", str(self._path))
            out, offset = out[done:], offset + done


def _open(path: Path, direct: bool) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        if direct:
            return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o600), False


def _claim(fd: int, path: Path) -> None:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"pool: {path} is not a regular file")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"pool: {path} is in use by another daemon") from None
    if info.st_size == 0:
        return
    with (
        mmap.mmap(fd, len(MAGIC), prot=mmap.PROT_READ)
        if info.st_size >= len(MAGIC)
        else mmap.mmap(-1, 1) as head
    ):
        if head[:] != MAGIC:
            raise ConfigError(f"pool: {path} has content that is not a cold pool; name a new file")


def _address(buffer: Bytes) -> int:
    return np.frombuffer(buffer, np.uint8).ctypes.data if len(buffer) else 0
