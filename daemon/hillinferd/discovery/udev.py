"""The only place that talks to udev, through pyudev, which is imported when it is first needed."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hillinfer_core.errors import HillInferError

_NO_LIBRARY = "libudev is not installed; on Debian or Ubuntu: apt-get install libudev1"


class UdevUnavailable(HillInferError):  # noqa: N818 -- named as the other typed errors are
    """pyudev or libudev is not installed."""

    status = "FAILED_PRECONDITION"


@dataclass(frozen=True)
class Change:
    """One event of udev: what happened, to what kind of device, at which place in sysfs."""

    action: str
    subsystem: str
    path: Path


@dataclass(frozen=True)
class Listing:
    """Places in sysfs of PCI functions, and of disks with udev's properties (None: not examined by udev)."""

    functions: tuple[Path, ...]
    disks: tuple[tuple[Path, Mapping[str, str] | None], ...]


def list_devices() -> Listing:
    """Return what is there now. Raises :class:`UdevUnavailable`; blocks for some milliseconds."""
    context = _context()
    functions = tuple(sorted(Path(device.sys_path) for device in context.list_devices(subsystem="pci")))
    disks = [
        (Path(device.sys_path), dict(device.properties) if "USEC_INITIALIZED" in device.properties else None)
        for device in context.list_devices(subsystem="block", DEVTYPE="disk")
    ]
    return Listing(functions, tuple(sorted(disks, key=lambda disk: disk[0])))


class Monitor:
    """Receives udev's events from its creation on; needs AF_NETLINK and a running udevd."""

    def __init__(self) -> None:
        self._monitor: Any = _pyudev().Monitor.from_netlink(_context())
        for subsystem in ("pci", "block"):
            self._monitor.filter_by(subsystem)
        self._monitor.start()

    def fileno(self) -> int:
        """Return the descriptor that becomes readable with an event."""
        return int(self._monitor.fileno())

    def pending(self) -> list[Change] | None:
        """Return the events that have come, without waiting; None if the kernel dropped some."""
        changes: list[Change] = []
        try:
            while (device := self._monitor.poll(timeout=0)) is not None:
                changes.append(Change(device.action or "", device.subsystem or "", Path(device.sys_path)))
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            return None
        return changes


def _context() -> Any:
    pyudev = _pyudev()
    try:
        return pyudev.Context()
    except ImportError:
        raise UdevUnavailable(_NO_LIBRARY) from None


def _pyudev() -> ModuleType:
    try:
        import pyudev
    except ImportError as error:
        if error.name != "pyudev":
            raise UdevUnavailable(_NO_LIBRARY) from None
        raise UdevUnavailable(
            "pyudev is not installed; it comes with the daemon: pip install 'hillinfer[daemon]'"
        ) from None
    return pyudev  # type: ignore[no-any-return]
