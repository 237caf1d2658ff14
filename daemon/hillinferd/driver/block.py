"""Block devices as pools: what the kernel says of them, and giving them a header."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

import numpy as np

from hillinfer_core import transfers
from hillinfer_core.errors import ConfigError
from hillinfer_core.layout import PAGE

from .header import HEADER_BYTES, MAGIC, Header
from .patience import while_busy

# linux/fs.h
_BLKSSZGET = 0x1268
_BLKGETSIZE64 = 0x80081272
_BLKDISCARD = 0x1277

_PROBED_BYTES = 1 << 20
"""Bytes at either end of a device where partition tables, file systems, LVM, LUKS and RAID leave their marks:
btrfs and GFS2 beyond 64 KiB, md's formats 0.90 and 1.0 and the copy of a GPT at the end (their formats)."""

_SMALLEST_BYTES = 128 << 10
"""Bytes of the smallest device that is formatted: room for the header and one extent."""


def is_block_device(path: Path) -> bool:
    """Return whether ``path``, links followed, is a block device."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def names_device(path: Path) -> bool:
    """Return whether ``path``, links followed, is a block device, or would be one: it lies below /dev.

    A drive that is away has no node. Nothing else may be made in its place: that would bar its return.
    """
    if os.path.exists(path):
        return is_block_device(path)
    place = Path(os.path.realpath(path)).parent
    while not os.path.exists(place):
        place = place.parent
    return os.stat(place).st_dev == os.stat("/dev").st_dev != os.stat("/").st_dev


def open_device(path: Path, flags: int) -> int:
    """Open the block device ``path`` for ourselves alone and return the descriptor.

    Raises :class:`ConfigError` for one that is mounted or in use (as a part of a volume, by another daemon),
    or that needs transfers above 4096 bytes.
    """
    try:
        fd = while_busy(lambda: os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC | flags))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ConfigError(
                f"pool: {path} is in use: mounted, part of a volume, or another daemon's; "
                "unmount it or name another device"
            ) from None
        raise
    sector = struct.unpack("I", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]
    if sector > PAGE:
        os.close(fd)
        raise ConfigError(f"pool: {path} has sectors of {sector} bytes, more than the {PAGE} of a page")
    return fd


def device_bytes(fd: int) -> int:
    """Return the size of the block device ``fd``, in whole pages."""
    return _all_bytes(fd) // PAGE * PAGE


def discard_device(fd: int, offset: int, length: int) -> None:
    """Tell the block device that a range is not wanted any more; raises ``OSError``."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", offset, length))


def format_device(path: Path, *, force: bool = False) -> str:
    """Make the block device ``path`` an empty pool and return the pool's id; what it held is lost.

    Raises :class:`ConfigError` for anything but a block device, for one that is mounted or in use, and,
    without ``force``, for one with any content in its first or last MiB. ``OSError`` if the device fails.
    """
    if not is_block_device(path):
        raise ConfigError(f"{path} is not a block device; a file needs no formatting, name it as the pool")
    fd = open_device(path, 0)
    try:
        size = _all_bytes(fd)
        if size < _SMALLEST_BYTES:
            raise ConfigError(f"{path} is too small for a cold pool")
        probed = min(_PROBED_BYTES, size)
        start, end = np.empty(probed, np.uint8), np.empty(probed, np.uint8)
        transfers.read_range(fd, 0, start, False)
        transfers.read_range(fd, size - probed, end, False)
        if (start.any() or end.any()) and not force:
            what = "a cold pool" if start.tobytes().startswith(MAGIC) else "content"
            raise ConfigError(f"{path} has {what} on it; to lose that, format with --force")
        with contextlib.suppress(OSError):  # a device that cannot discard is as good a pool
            discard_device(fd, 0, device_bytes(fd))
        # The capacity of a pool that nobody has opened yet: see Storage.
        header = Header.new(HEADER_BYTES)
        start[:], end[:] = 0, 0
        start[:HEADER_BYTES] = np.frombuffer(header.pack(), np.uint8)
        # The header last: on a small device the two overlap.
        transfers.write_range(fd, size - probed, end, False)
        transfers.write_range(fd, 0, start, False)
        os.fsync(fd)
    finally:
        os.close(fd)
    return header.pool_id


def _all_bytes(fd: int) -> int:
    # The copy of a GPT is in the last sector, which may be beyond the last whole page.
    size: int = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
    return size
