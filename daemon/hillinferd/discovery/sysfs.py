"""Reads sysfs. A device may go while it is looked at: what cannot be read is not there."""

from __future__ import annotations

import re
from pathlib import Path

from .model import Link

_ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_UNSET = 0x20000000
_MEMORY = 0x200
"""IORESOURCE_UNSET and IORESOURCE_MEM of Linux's include/linux/ioport.h."""
_BARS = 6
"""Lines of ``resource`` that are base address registers; the expansion ROM and bridge windows follow."""


def text(path: Path) -> str:
    """Return the attribute at ``path`` without surrounding space, empty if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip("\0 \t\n")
    except OSError:
        return ""


def number(path: Path) -> int | None:
    """Return the attribute at ``path`` as an integer, decimal or 0x; None if it is none."""
    try:
        return int(text(path), 0)
    except ValueError:
        return None


def link_name(path: Path) -> str:
    """Return the last part of what the symbolic link ``path`` points to, empty without one."""
    try:
        return path.readlink().name
    except OSError:
        return ""


def children(path: Path, pattern: str) -> list[Path]:
    """Return what matches ``pattern`` in directory ``path``, by name."""
    try:
        return sorted(path.glob(pattern))
    except OSError:
        return []


def pci_id(path: Path) -> str:
    """Return ``vendor:device`` of a PCI function, for example ``10ee:6988``."""
    vendor, device = number(path / "vendor"), number(path / "device")
    return f"{vendor:04x}:{device:04x}" if vendor is not None and device is not None else ""


def pci_function(path: Path) -> Path | None:
    """Return the PCI function that ``path`` is or lies below."""
    return next((place for place in (path, *path.parents) if _ADDRESS.fullmatch(place.name)), None)


def pci_link(path: Path) -> Link | None:
    """Return the link of a PCI function, None where the kernel does not know it."""
    speeds = [_speed(text(path / name)) for name in ("current_link_speed", "max_link_speed")]
    widths = [number(path / name) for name in ("current_link_width", "max_link_width")]
    if None in speeds or None in widths:
        return None
    return Link(speeds[0] or 0.0, widths[0] or 0, speeds[1] or 0.0, widths[1] or 0)


def memory_bars(path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes in bytes of a function's memory BARs: those with an address, and those without."""
    assigned: list[int] = []
    unassigned: list[int] = []
    for line in text(path / "resource").splitlines()[:_BARS]:
        try:
            start, end, flags = (int(field, 16) for field in line.split())
        except ValueError:
            continue
        if flags & _MEMORY and end > start:
            placed = start != 0 and not flags & _UNSET
            (assigned if placed else unassigned).append(end - start + 1)
    return tuple(assigned), tuple(unassigned)


def iommu_domain(path: Path) -> str:
    """Return the kind of IOMMU domain a function is in (``unknown`` if the kernel keeps it), else empty."""
    if not link_name(path / "iommu_group"):
        return ""
    return text(path / "iommu_group" / "type") or "unknown"


def _speed(attribute: str) -> float | None:
    # "8.0 GT/s PCIe"; "Unknown" where the link is not trained.
    try:
        return float(attribute.split()[0])
    except (IndexError, ValueError):
        return None
