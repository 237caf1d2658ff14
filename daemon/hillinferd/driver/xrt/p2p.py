"""Whether the drive can write into the card's memory."""

from __future__ import annotations

import logging

from hillinfer_core.errors import DeviceUnavailable
from hillinfer_core.layout import PAGE

from .buffers import Buffer
from .card import Card
from .transfer import Reader

log = logging.getLogger(__name__)

OFF = (
    "card %s: P2P is off (%s): evaluation keys pass through the host's memory, slower than they might. "
    'To have it: switch on "Above 4G decoding" (and "Resizable BAR", where there is one) in the BIOS and '
    "restart; set the IOMMU to pass-through (iommu=pt) or off; `xbutil configure --p2p enable -d %s`, and "
    "restart (warm) if it asks for it; p2p_enable of the card in sysfs then reads 1 (docs/smartssd.md)"
)


def p2p_works(card: Card, group: int, reader: Reader, first_page: bytes) -> bool:
    """Read the pool's first page into the card's memory; tell, and warn of the steps to take if it cannot be.

    ``first_page`` is what the page holds. Blocks for a read.
    """
    try:
        fault = _fault(card, group, reader, first_page)
    except (DeviceUnavailable, MemoryError, OSError) as error:
        fault = str(error.__cause__ or error)  # without the general advice
    if fault:
        log.warning(OFF, card.bdf, fault, card.bdf)
    return not fault


def _fault(card: Card, group: int, reader: Reader, first_page: bytes) -> str:
    buffer = Buffer(card, PAGE, group, p2p=True)
    try:
        with buffer.view[:PAGE] as view:
            reader.fill(view, 0)
            same = view.tobytes() == first_page
    finally:
        buffer.close()
    return "" if same else "what was read is not what the drive holds"
