"""The arena: a memfd that client and daemon both map, so that bulk bytes never travel in messages.

The daemon creates it with :func:`create_arena` and passes the descriptor; both map it as :class:`Arena`.
Its seals make a peer unable to shrink the file under a mapping, which would turn reads into SIGBUS.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput
from .layout import PAGE

# From linux/fcntl.h; the fcntl module lacks the names in some builds.
_F_ADD_SEALS = 1033
_F_GET_SEALS = 1034
_SEALS = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW


def create_arena(nbytes: int, name: str) -> int:
    """Create a sealed memfd of ``nbytes`` rounded up to whole pages; return its descriptor, to be closed.

    Seals: no shrinking, no growing, no further seals. ``name`` shows in /proc only. Raises
    :class:`InvalidInput` for a size below 1.
    """
    if nbytes < 1:
        raise InvalidInput(f"an arena needs at least 1 byte, not {nbytes}")
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, -(-nbytes // PAGE) * PAGE)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Arena:
    """A writable mapping of an arena; safe to use from any thread, with no locking of its contents.

    Takes no ownership of ``fd``, which may be closed afterwards. The mapping lives until the last view of it
    is gone. With ``verify`` the descriptor is taken to come from a peer, and :class:`InvalidInput` is raised
    unless it has at least ``nbytes`` and is sealed against shrinking and growing.
    """

    def __init__(self, fd: int, nbytes: int, *, verify: bool = False) -> None:
        if nbytes < 1:
            raise InvalidInput(f"an arena needs at least 1 byte, not {nbytes}")
        if verify:
            _verify(fd, nbytes)
        self._map = mmap.mmap(fd, nbytes)
        self.nbytes = nbytes
        self.content: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        """All of it, uint8 [nbytes], writable."""

    def buffer(self, offset: int, length: int) -> memoryview:
        """Return ``length`` bytes at ``offset``, not copied; raises :class:`InvalidInput` out of bounds."""
        if offset < 0 or length < 0 or offset + length > self.nbytes:
            raise self._outside(offset, length)
        return memoryview(self._map)[offset : offset + length]

    def view(self, offset: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return a writable C-ordered array of ``shape`` at byte ``offset`` without copying.

        The array keeps the mapping alive. Raises :class:`InvalidInput` out of bounds, for a negative
        dimension, or where ``offset`` is not a multiple of the item size.
        """
        item = np.dtype(dtype)
        count = 1
        for dim in shape:
            if dim < 0:
                raise InvalidInput(f"a region cannot have the shape {shape}")
            count *= dim
        if offset % item.itemsize:
            raise InvalidInput(
                f"region offset {offset} is not a multiple of {item.itemsize}, the size of {item}"
            )
        if offset < 0 or offset + count * item.itemsize > self.nbytes:
            raise self._outside(offset, count * item.itemsize)
        return np.ndarray(shape, item, buffer=self._map, offset=offset)

    def _outside(self, offset: int, length: int) -> InvalidInput:
        return InvalidInput(
            f"region of {length} bytes at {offset} does not lie within the arena of {self.nbytes} bytes"
        )


def _verify(fd: int, nbytes: int) -> None:
    size = os.fstat(fd).st_size
    if size < nbytes:
        raise InvalidInput(f"the arena has {size} bytes, not the {nbytes} that were granted")
    try:
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError as error:
        raise InvalidInput("the arena is not a memfd") from error
    if seals & _SEALS != _SEALS:
        raise InvalidInput("the arena is not sealed against shrinking and growing")
