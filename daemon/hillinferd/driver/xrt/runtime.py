"""pyxrt: imported when a card is opened and not before, and what its errors mean to the user."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hillinfer_core.errors import DeviceUnavailable

_REMEDIES = (
    (
        ("iomem",),
        'the card got no address space: switch on "Above 4G decoding" in the BIOS, then restart the machine '
        "(warm)",
    ),
    (
        ("permission", "not permitted", "eacces"),
        "let the daemon's user open the card's render node: usermod -aG render USER, then log in again",
    ),
    (
        ("uuid", "interface"),
        "the bitstream is not for the card's shell, or is not the one loaded: hillinferctl cec status, then "
        "hillinferctl cec load",
    ),
    (
        ("busy", "in use", "conflict"),
        "another process uses the card: end it (xbutil examine -d BDF -r dynamic-regions names it)",
    ),
    (
        ("no such device", "offline", "enodev", "could not open"),
        "the card is gone: look for it with xbutil examine; after 100 C it stays off until a cold restart",
    ),
)
"""Parts of a message, in lower case, and what to do. The failures are those of the vendor's documents."""


def load_pyxrt() -> Any:
    """Return the module pyxrt; raises :class:`DeviceUnavailable` that says how to get it."""
    try:
        return importlib.import_module("pyxrt")
    except ImportError as error:
        raise DeviceUnavailable(
            f"pyxrt cannot be imported ({error}); install XRT and start the daemon after "
            "`source /opt/xilinx/xrt/setup.sh` (docs/smartssd.md)"
        ) from None


@contextmanager
def explained(card: str, doing: str) -> Iterator[None]:
    """Turn what pyxrt raises into :class:`DeviceUnavailable` that names the remedy.

    MemoryError (the card's memory is full) passes: who asked knows what to do. So does TypeError, a mistake
    of ours.
    """
    try:
        yield
    except (RuntimeError, IndexError, OSError) as error:
        raise DeviceUnavailable(
            f"card {card}: {doing} failed ({error}); {remedy(card, str(error))}"
        ) from error


def remedy(card: str, message: str) -> str:
    """Return what to do about an error of pyxrt whose text is ``message``."""
    lower = message.lower()
    for parts, advice in _REMEDIES:
        if any(part in lower for part in parts):
            return advice.replace("BDF", card)
    return f"see `xbutil examine -d {card}` and dmesg, or reset it with `{reset(card)}` (docs/smartssd.md)"


def reset(card: str) -> str:
    """Return the command that resets the card."""
    return f"xbutil reset -d {card}"
