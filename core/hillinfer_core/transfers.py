"""Bytes of a pool in and out, in native code: rows that lie scattered, whole ranges, holes.

Every call checks its arguments (:class:`InvalidInput`), blocks until done with the GIL released, and may be
made from any thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import _native
from .errors import InvalidInput
from .layout import PAGE
from .reference import U8

_MAX_ROW_BYTES = 16 * PAGE


def is_memory(fd: int) -> bool:
    """Say whether the file ``fd`` lies on a file system that is memory: tmpfs or ramfs."""
    return _native.is_memory(fd)


def copy_rows(memory: U8, offsets: npt.NDArray[np.uint64], out: U8) -> None:
    """Copy rows that lie scattered in ``memory`` uint8 [bytes] to ``out`` uint8 [n, row bytes].

    ``offsets`` uint64 [n] are in any order, repeats allowed.
    """
    _require(memory.dtype == np.uint8 and memory.ndim == 1, "memory must be uint8 [bytes]")
    _require(memory.flags.c_contiguous, "memory must be C-contiguous")
    _require(out.dtype == np.uint8 and out.ndim == 2, "out must be uint8 [n, row bytes]")
    _require(out.flags.c_contiguous and out.flags.writeable, "out must be C-contiguous and writable")
    _require(offsets.dtype == np.uint64 and offsets.shape == out.shape[:1], "offsets must be uint64 [n]")
    copied = _native.copy_rows(memory, np.ascontiguousarray(offsets), out)
    _require(copied, "a row is not within the memory")


def gather(
    fd: int,
    offsets: npt.NDArray[np.uint64],
    row_bytes: int,
    out: npt.NDArray[Any],
    direct: bool,
    depth: int = 64,
) -> tuple[int, int]:
    """Read rows that lie scattered in a file; return the bytes read, and with how many requests.

    ``offsets`` uint64 [n] are byte offsets in any order, repeats allowed; row i goes to the i-th
    ``row_bytes`` of ``out``, which is C-contiguous, of any shape and dtype, and has at least n of them. With
    ``direct`` whole pages are read, as a descriptor opened with O_DIRECT needs, and together when at most
    two pages apart, up to 128 KiB; else only rows that touch are read together. Rows that follow one another
    in the file as in ``out``, all in whole pages, are read in place.

    With ``direct``, ``depth`` requests (1 to 64) are in flight, by the kernel's asynchronous I/O; without, a
    few threads copy what is much. Calls from several threads take turns, with those of the functions for
    ranges too. Raises :class:`OSError` with the errno of a failed read (EIO when the file ends before a row
    does); ``out`` is then undefined.
    """
    _require(offsets.dtype == np.uint64 and offsets.ndim == 1, "offsets must be uint64 [n]")
    _require(1 <= depth <= 64, f"depth must be 1 to 64, not {depth}")
    _require(0 < row_bytes <= _MAX_ROW_BYTES, f"row_bytes must be 1 to {_MAX_ROW_BYTES}, not {row_bytes}")
    count = offsets.size
    _require(out.flags.c_contiguous and out.flags.writeable, "out must be C-contiguous and writable")
    _require(out.nbytes >= count * row_bytes, f"out has {out.nbytes} bytes, not {count * row_bytes}")
    if count == 0:
        return 0, 0
    _require(int(offsets.max()) < 1 << 62, "offsets must be below 2**62")
    rows = out.reshape(-1).view(np.uint8)[: count * row_bytes].reshape(count, row_bytes)
    return _native.gather(fd, np.ascontiguousarray(offsets), rows, direct, depth)


def read_range(fd: int, offset: int, out: U8, direct: bool) -> None:
    """Fill ``out`` uint8 [n], C-contiguous, from byte ``offset`` of a file.

    The range is split in chunks of 512 KiB, which are in flight together with ``direct``: then the address,
    the length and the offset are multiples of 4096. Raises :class:`OSError`: EIO when the file ends too
    early, else the errno of a failed read; ``out`` is then undefined.
    """
    _require(out.dtype == np.uint8 and out.ndim == 1 and out.flags.c_contiguous, "out must be uint8 [n]")
    _require(out.flags.writeable, "out must be writable")
    _native.read_range(fd, offset, out, direct)


def write_range(fd: int, offset: int, data: U8, direct: bool) -> None:
    """Write ``data`` uint8 [n], C-contiguous, to byte ``offset`` of a file; in chunks as :func:`read_range`.

    Raises :class:`OSError`: ENOSPC when the file takes no more, else the errno of a failed write; which of
    the bytes have been written is then unknown.
    """
    _require(data.dtype == np.uint8 and data.ndim == 1 and data.flags.c_contiguous, "data must be uint8 [n]")
    _native.write_range(fd, offset, data, direct)


def direct_alignment(fd: int) -> tuple[int, int] | None:
    """Return the alignment in bytes of (memory, offsets) for direct I/O on a file, as statx(2) has it.

    (0, 0) if the file has no direct I/O, None where the kernel (before Linux 6.1) or
    the file system does not say.
    """
    return _native.direct_alignment(fd)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the blocks of a byte range of a file back to the file system; the range then reads as zeros.

    Raises :class:`OSError`; errno is EOPNOTSUPP where the file system cannot.
    """
    _native.punch_hole(fd, offset, length)


def _require(held: bool, message: str) -> None:
    if not held:
        raise InvalidInput(message)
