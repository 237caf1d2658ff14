"""What discovery finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FPGA_MANAGEMENT = "10ee:6987"
FPGA_USER = "10ee:6988"
CARD_NVME = frozenset({"144d:a825", "144d:a824"})
CARD_SWITCH = "10ee:9134"
"""PCI ids (vendor:device) of a SmartSSD's functions and of the switch above them, from vendor documents and
published dumps. Class codes differ between cards and are not looked at."""


@dataclass(frozen=True)
class Problem:
    """Something that keeps a device from being used (``blocks``) or slows it, and what to do about it."""

    text: str
    remedy: str
    blocks: bool = True


@dataclass(frozen=True)
class Link:
    """A PCI Express link as it runs and at its best; speeds in GT/s a lane, widths in lanes."""

    speed: float
    width: int
    max_speed: float
    max_width: int

    def __str__(self) -> str:
        return f"{self.speed:g} GT/s x{self.width}"


@dataclass(frozen=True)
class Namespace:
    """An NVMe namespace; sizes in bytes.

    ``pci_address`` is that of its controller, empty for a drive that is not on PCI. ``signature`` names the
    file system or partition table on it, empty for none and None if nobody has looked. ``sequence`` is the
    kernel's number of this appearance of the disk, 0 before Linux 5.15. ``path`` is its place in sysfs and
    ``controller`` that of its PCI function.
    """

    node: str
    model: str
    serial: str
    size: int
    block_size: int
    pci_address: str
    signature: str | None
    sequence: int
    path: Path
    controller: Path | None
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> bool:
        """Whether all of it may become a cold pool: nothing mounted, holding, or lying on it."""
        return not any(problem.blocks for problem in self.problems)

    @property
    def identity(self) -> tuple[object, ...]:
        """What is another device when it differs; problems come and go with what is done to a drive."""
        return self.node, self.serial, self.size, self.block_size, self.sequence, self.path


@dataclass(frozen=True)
class Fpga:
    """The FPGA of a SmartSSD: a management function and, once it is flashed, a user function.

    ``management`` and ``user`` are PCI addresses, empty where there is no such function; ``driver`` and
    ``management_driver`` are what is bound to them, empty for nothing. ``ready`` and ``p2p`` are None where
    the driver does not say. ``shell`` is the name of the platform, empty where the driver does not say.
    ``bars`` are sizes in bytes of the memory that the kernel assigned to the user function, and
    ``unassigned_bars`` of what it could not place.
    """

    management: str
    user: str
    management_driver: str
    driver: str
    render_node: str
    ready: bool | None
    shell: str
    interface_uuids: tuple[str, ...]
    xclbin_uuid: str
    p2p: bool | None
    link: Link | None
    bars: tuple[int, ...]
    unassigned_bars: tuple[int, ...]
    iommu: str
    """Kind of the IOMMU's domain, for example ``DMA``; empty without an IOMMU."""
    paths: tuple[Path, ...]
    """Places of its functions in sysfs."""

    @property
    def address(self) -> str:
        """The PCI address to name the card by: of the user function if there is one."""
        return self.user or self.management

    @property
    def flashed(self) -> bool:
        """False for a card that has no shell yet: it shows no user function, or is a bare ``xilinx_u2``."""
        return bool(self.user) and self.shell != "xilinx_u2"


@dataclass(frozen=True)
class SmartSsd:
    """An FPGA and the NVMe namespace that shares its card; ``uplink`` is the card's link to the host."""

    fpga: Fpga
    namespace: Namespace | None
    uplink: Link | None
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> bool:
        """Whether the xrt driver can run on it: it is ready, and its namespace is there and usable."""
        return not any(problem.blocks for problem in self.problems)

    @property
    def identity(self) -> tuple[object, ...]:
        """What is another device when it differs."""
        return self.fpga.paths, self.namespace.identity if self.namespace else None


@dataclass(frozen=True)
class Inventory:
    """All that was found; the namespace of a card is in ``namespaces`` too."""

    namespaces: tuple[Namespace, ...] = ()
    cards: tuple[SmartSsd, ...] = ()
