"""Machines as sysfs shows them, for a directory of their own and for umockdev."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hillinferd.discovery.udev import Listing

ROOT_PORT = "pci0000:00/0000:00:01.0"
SHELL = "xilinx_u2_gen3x4_xdma_gc_base_2"
INTERFACE_UUID = "f2b82d53372f45a4bbe93d1c980216da"


@dataclass(frozen=True)
class Device:
    """A device: its place below /sys/devices, attributes, udev's properties, links and node below /dev."""

    path: str
    subsystem: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    properties: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    node: str = ""

    def bound(self, driver: str) -> Device:
        return replace(self, links={**self.links, "driver": _up(self.path) + f"bus/pci/drivers/{driver}"})


def function(path: str, ids: str, driver: str = "", **attributes: str) -> Device:
    vendor, device = ids.split(":")
    made = Device(path, "pci", {"vendor": f"0x{vendor}\n", "device": f"0x{device}\n", **attributes})
    return made.bound(driver) if driver else made


def link(speed: str = "8.0 GT/s PCIe", width: int = 4) -> dict[str, str]:
    return {
        "current_link_speed": f"{speed}\n",
        "current_link_width": f"{width}\n",
        "max_link_speed": "8.0 GT/s PCIe\n",
        "max_link_width": "4\n",
    }


def drive(controller: str, number: int, ids: str = "144d:a825", signature: str = "") -> list[Device]:
    """An NVMe drive whose PCI function is at ``controller``, with one namespace."""
    return [
        function(controller, ids, "nvme"),
        Device(
            f"{controller}/nvme/nvme{number}",
            "nvme",
            {"model": "SAMSUNG MZ1LB3T8HMLA  \n", "serial": f"S4DUMMY{number}\n"},
        ),
        Device(
            f"{controller}/nvme/nvme{number}/nvme{number}n1",
            "block",
            {
                "size": "7501476528\n",
                "ro": "0\n",
                "dev": f"259:{number}\n",
                "queue/logical_block_size": "512\n",
                "diskseq": f"{number + 1}\n",
            },
            {"DEVTYPE": "disk", "USEC_INITIALIZED": "1", **({"ID_FS_TYPE": signature} if signature else {})},
            {"device": f"../../nvme{number}"},
            f"nvme{number}n1",
        ),
    ]


def card(
    upstream: str,
    bus: int,
    number: int | None,
    *,
    flashed: bool = True,
    bound: bool = True,
    ready: bool = True,
    p2p: bool = True,
    uplink: Mapping[str, str] | None = None,
) -> list[Device]:
    """A SmartSSD whose switch hangs below ``upstream``, on buses from ``bus``; drive ``number``, or none."""
    switch = f"{upstream}/0000:{bus:02x}:00.0"
    fpga = f"{switch}/0000:{bus + 1:02x}:01.0/0000:{bus + 3:02x}:00"
    made = [
        function(switch, "10ee:9134", "pcieport", **(uplink or link())),
        function(f"{switch}/0000:{bus + 1:02x}:00.0", "10ee:9234", "pcieport"),
        function(f"{switch}/0000:{bus + 1:02x}:01.0", "10ee:9434", "pcieport"),
        function(f"{fpga}.0", "10ee:6987", "xclmgmt", **link()),
    ]
    if number is not None:
        made += drive(f"{switch}/0000:{bus + 1:02x}:00.0/0000:{bus + 2:02x}:00.0", number)
    if not flashed:
        made[3] = replace(made[3], attributes={**made[3].attributes, "rom.m.1/VBNV": "xilinx_u2\n"})
    else:
        made += user_function(f"{fpga}.1", bus, bound=bound, ready=ready, p2p=p2p)
    return made


def user_function(
    path: str, bus: int, *, bound: bool = True, ready: bool = True, p2p: bool = True
) -> list[Device]:
    large = "0x0000380000000000 0x00003801ffffffff 0x000000000014220c"
    small = "0x0000380200000000 0x000038020fffffff 0x000000000014220c"
    attributes = {
        **link(),
        "resource": "\n".join(
            (
                "0x0000380210000000 0x0000380211ffffff 0x000000000014220c",
                "0x0000000000000000 0x0000000000000000 0x0000000000000000",
                large if p2p else small,
                "0x0000000000000000 0x0000000000000000 0x0000000000000000",
                "0x0000380212000000 0x000038021200ffff 0x000000000014220c",
                "",
            )
        ),
    }
    bare = function(path, "10ee:6988", **attributes)
    if not bound:
        return [bare]
    render = f"renderD{128 + bus}"
    driven = replace(
        bare,
        attributes={
            **bare.attributes,
            "ready": "0x1\n" if ready else "0x0\n",
            "interface_uuids": f"{INTERFACE_UUID}\n",
            "xclbinuuid": "\n",
            "rom.u.1/VBNV": f"{SHELL}\n",
            "p2p.u.1/p2p_enable": "1\n" if p2p else "0\n",
        },
    ).bound("xocl")
    return [
        driven,
        Device(f"{path}/drm/{render}", "drm", {"dev": f"226:{128 + bus}\n"}, node=f"dri/{render}"),
    ]


def root_port() -> Device:
    return function(ROOT_PORT, "8086:3c04", "pcieport")


def outer_switch() -> tuple[list[Device], str, str]:
    """A root port with a switch of another vendor below; return it and two ports for what is plugged in."""
    above = f"{ROOT_PORT}/0000:10:00.0"
    ports = (f"{above}/0000:11:00.0", f"{above}/0000:11:01.0")
    devices = [root_port(), *(function(path, "1000:c010", "pcieport") for path in (above, *ports))]
    return devices, *ports


def one_pair(**options: object) -> list[Device]:
    return [root_port(), *card(ROOT_PORT, 1, 0, **options)]  # type: ignore[arg-type]


def write_tree(root: Path, devices: Iterable[Device]) -> Listing:
    """Write ``devices`` as files below ``root`` and return what udev would list."""
    functions, disks = [], []
    for device in devices:
        place = root / "devices" / device.path
        place.mkdir(parents=True, exist_ok=True)
        for name, value in device.attributes.items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text(value)
        for name, target in device.links.items():
            (place / name).symlink_to(target)
        if device.subsystem == "pci":
            functions.append(place)
        elif device.subsystem == "block":
            disks.append((place, device.properties))
    return Listing(tuple(functions), tuple(disks))


def describe(devices: Iterable[Device]) -> str:
    """Return ``devices`` in the language of umockdev-record."""
    blocks = []
    for device in devices:
        lines = [f"P: /devices/{device.path}", f"E: SUBSYSTEM={device.subsystem}"]
        if device.node:
            lines += [f"N: {device.node}", f"E: DEVNAME=/dev/{device.node}"]
        lines += [f"E: {name}={value}" for name, value in device.properties.items()]
        for name, value in device.attributes.items():
            lines.append(f"A: {name}={value}".replace("\n", "\\n"))
        lines += [f"L: {name}={target}" for name, target in device.links.items()]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _up(path: str) -> str:
    return os.path.join(*[".."] * (path.count("/") + 2), "")
