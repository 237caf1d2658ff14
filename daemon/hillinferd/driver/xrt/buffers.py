"""Memory of the card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hillinfer_core.layout import PAGE

from ..contract import Bytes
from .card import Card
from .runtime import explained

_ZEROS = bytes(1 << 20)


class Buffer:
    """``size`` bytes of the card's memory and the view that maps them: neither outlives the other.

    With ``p2p`` the view is the card's own memory, which a drive can write to; else it is a copy in the
    host's memory, and :meth:`to_card` and :meth:`from_card` carry bytes over. All of it is zero at first:
    reading memory of the card that was never written can raise an ECC error and restart the host (vendor's
    documents).

    Raises ``MemoryError`` if the card has no room, :class:`~hillinfer_core.errors.DeviceUnavailable` else.
    """

    def __init__(self, card: Card, size: int, group: int, *, p2p: bool) -> None:
        flags = card.xrt.bo.flags
        self.size = size
        self.p2p = p2p
        self._card = card
        self._bo: Any = None
        self._view: Bytes | None = None
        with explained(card.bdf, f"allocating {size} bytes"):
            self._bo = card.xrt.bo(card.device, size, flags.p2p if p2p else flags.normal, group)
            self._view = self._bo.map()
        zero(self)

    @property
    def bo(self) -> Any:
        """The buffer as an argument of a kernel."""
        return self._bo

    @property
    def view(self) -> Bytes:
        """The bytes; slices of it must be gone before :meth:`close`."""
        assert self._view is not None, "the buffer is closed"
        return self._view

    def to_card(self, length: int) -> None:
        """Make the first ``length`` bytes of the view what the card sees."""
        if not self.p2p:
            self._sync(self._card.xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE, length)

    def from_card(self, length: int) -> None:
        """Make the first ``length`` bytes of the view what the card has written."""
        if not self.p2p:
            self._sync(self._card.xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_FROM_DEVICE, length)

    def close(self) -> None:
        """Give the memory back; the view first, as touching it afterwards would end the process."""
        if self._view is not None:
            self._view.release()
        self._view = self._bo = None

    def __del__(self) -> None:
        self.close()

    def _sync(self, direction: Any, length: int) -> None:
        with explained(self._card.bdf, f"copying {length} bytes"):
            self._bo.sync(direction, length, 0)


def zero(buffer: Buffer) -> None:
    """Write zeros over all of ``buffer``."""
    for start in range(0, buffer.size, len(_ZEROS)):
        length = min(len(_ZEROS), buffer.size - start)
        buffer.view[start : start + length] = _ZEROS[:length]
    buffer.to_card(buffer.size)


class Scratch:
    """A buffer that makes way for a larger one when more is wanted; its bytes are then lost.

    ``make`` takes a size in bytes and returns a buffer of it, or raises as :class:`Buffer` does.
    """

    def __init__(self, make: Callable[[int], Buffer], size: int) -> None:
        self._make = make
        self._buffer: Buffer | None = make(size)

    @property
    def buffer(self) -> Buffer:
        """The buffer as it is."""
        return self.fit(PAGE)

    def fit(self, size: int) -> Buffer:
        """Return the buffer, of at least ``size`` bytes."""
        if self._buffer is None or self._buffer.size < size:
            self.close()
            self._buffer = self._make(max(PAGE, 1 << (size - 1).bit_length()))
        return self._buffer

    def close(self) -> None:
        """Give the memory back."""
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None
