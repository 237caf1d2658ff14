"""NVMe namespaces, and whether one may become a cold pool."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .model import Namespace, Problem
from .sysfs import children, number, pci_function, text

_SECTOR = 512
"""Bytes in the unit of sysfs' ``size``, whatever the drive's own (Linux, ABI/stable/sysfs-block)."""

_CONTROLLER = re.compile(r"nvme\d+")
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Usage:
    """Where block devices are mounted or swapped to, by ``major:minor`` and by node."""

    mounts: Mapping[str, str]

    @classmethod
    def of(cls, mountinfo: str, swaps: str) -> Usage:
        """Parse the text of ``/proc/self/mountinfo`` and ``/proc/swaps`` (proc(5))."""
        mounts: dict[str, str] = {}
        for line in mountinfo.splitlines():
            fields = line.split()
            if len(fields) < 10 or "-" not in fields[6:]:
                continue
            place = _plain(fields[4])
            mounts.setdefault(fields[2], place)
            # A btrfs mount has a number of its own: its source is what tells.
            mounts.setdefault(_plain(fields[fields.index("-", 6) + 2]), place)
        for line in swaps.splitlines()[1:]:
            mounts.setdefault(_plain(line.split()[0]), "swap")
        return cls(mounts)

    @classmethod
    def read(cls) -> Usage:
        """Return the usage now, as this process sees it: another mount namespace may mount more."""
        return cls.of(text(Path("/proc/self/mountinfo")), text(Path("/proc/swaps")))


def read_namespace(path: Path, properties: Mapping[str, str] | None, usage: Usage) -> Namespace:
    """Return the namespace at ``path`` in sysfs.

    ``properties`` are udev's, whose rules have looked for signatures; None if udev has not seen the device.
    """
    node = f"/dev/{path.name}"
    controller = _controller(path)
    signature = None
    if properties is not None:
        signature = properties.get("ID_FS_TYPE") or properties.get("ID_PART_TABLE_TYPE", "")
    size = (number(path / "size") or 0) * _SECTOR
    return Namespace(
        node=node,
        model=text(path / "device" / "model"),
        serial=text(path / "device" / "serial"),
        size=size,
        block_size=number(path / "queue" / "logical_block_size") or 0,
        pci_address=controller.name if controller else "",
        signature=signature,
        sequence=number(path / "diskseq") or 0,
        path=path,
        controller=controller,
        problems=tuple(_problems(path, node, size, signature, usage)),
    )


def _controller(path: Path) -> Path | None:
    direct = pci_function(path)
    if direct is not None:
        return direct
    # With multipath the namespace lies below a virtual subsystem, which links to its controllers.
    for entry in children(path.parent, "nvme*"):
        if _CONTROLLER.fullmatch(entry.name) and entry.is_symlink():
            return pci_function(entry.resolve())
    return None


def _problems(path: Path, node: str, size: int, signature: str | None, usage: Usage) -> Iterator[Problem]:
    if size == 0:
        yield Problem(f"{node} has no capacity", "create a namespace on it with nvme-cli: nvme create-ns")
        return
    if number(path / "ro"):
        yield Problem(
            f"{node} is read-only",
            f"clear it with blockdev --setrw {node}; a drive at the end of its life stays read-only",
        )
    partitions = [place.parent for place in children(path, f"{path.name}p*/partition")]
    free = []
    for place in (path, *partitions):
        used = list(_uses(place, usage))
        yield from used
        if not used:
            free.append(f"/dev/{place.name}")
    if partitions:
        names = ", ".join(name for name in free if name != node)
        yield Problem(
            f"{node} has partitions",
            f"name one that nobody needs as the pool: {names}" if names else "name a file there as the pool",
        )
    elif signature is None:
        yield Problem(
            f"it is not known what is on {node}: udev has not examined it",
            f"udevadm trigger --settle {node}, or look with blkid --probe {node}",
        )
    elif signature:
        yield Problem(
            f"{node} has content: {signature}",
            f"if nobody needs it, erase its marks: wipefs --all {node}; else use a file there as the pool",
        )


def _uses(place: Path, usage: Usage) -> Iterator[Problem]:
    node = f"/dev/{place.name}"
    mount = usage.mounts.get(text(place / "dev")) or usage.mounts.get(node)
    if mount == "swap":
        yield Problem(f"{node} is swap", "use another drive, or take it out of /etc/fstab and swapoff")
    elif mount:
        yield Problem(f"{node} is mounted at {mount}", f"name a file below {mount} as the pool")
    if holders := [entry.name for entry in children(place / "holders", "*")]:
        yield Problem(
            f"{node} is held by {', '.join(holders)}",
            "it is part of a volume or an array: name a file or a volume there as the pool",
        )


def is_namespace(path: Path) -> bool:
    """Whether block device ``path`` in sysfs is an NVMe namespace, and not one path of several to it."""
    return path.name.startswith("nvme") and not number(path / "hidden")


def _plain(field: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), field)
