"""Checks of SmartSSDs. The facts come from vendor documents: no check here has ever met a real card."""

from __future__ import annotations

from ..discovery.model import Link, SmartSsd
from .model import Finding, Machine, failed, not_applicable, of_cards, ok, warning, worst

P2P_BAR = 8 << 30
"""Bytes of the user function's BAR for P2P (vendor documents; the others have 32 MB and 64 KB)."""

CARD_LINK = Link(8.0, 4, 8.0, 4)
"""The card's link to the host at its best, PCIe Gen3 x4 (vendor documents): 8 GT/s a lane."""

PASS_THROUGH = "identity"
"""Kind of the IOMMU's domain with iommu=pt (sysfs-kernel-iommu_groups of Linux)."""

_ABOVE_4G = 'turn on "Above 4G decoding" in the BIOS setup, then a warm reboot'


def card(machine: Machine) -> Finding:
    """Each card is flashed, paired with its drive, and its drivers say that it is ready."""
    if machine.inventory is None:
        return not_applicable("devices could not be listed")
    if not machine.cards:
        return not_applicable("no SmartSSD; the host driver needs none")
    return worst(_card(one) for one in machine.cards)


def _card(one: SmartSsd) -> Finding:
    fpga, space = one.fpga, one.namespace
    if one.usable and space is not None:
        return ok(f"{fpga.address}: ready, with {space.node}, shell {fpga.shell or 'unknown'}")
    problems = [problem for problem in one.problems if problem.blocks]
    return failed(
        f"{fpga.address}: " + "; ".join(problem.text for problem in problems),
        "; ".join(problem.remedy for problem in problems),
    )


def p2p(machine: Machine) -> Finding:
    """The driver says ``p2p_enable`` 1: the drive can write into the FPGA's DRAM."""
    return of_cards(machine, _p2p)


def _p2p(one: SmartSsd) -> Finding:
    if one.fpga.p2p:
        return ok("P2P is on")
    if one.fpga.p2p is None:
        return warning(
            "the driver does not say whether P2P is on", "load the driver xocl and run doctor again"
        )
    return warning(
        "P2P is off; bytes take a detour through host memory",
        f"as root: xbutil configure --p2p enable --device {one.fpga.address}, then a warm reboot",
    )


def above_4g(machine: Machine) -> Finding:
    """The kernel gave the user function its 8 GB BAR for P2P, which needs addresses above 4 GB.

    "no iomem" is what the driver says otherwise. With P2P off the BAR may be smaller on purpose.
    """
    return of_cards(machine, _above_4g)


def _above_4g(one: SmartSsd) -> Finding:
    fpga = one.fpga
    if any(size >= P2P_BAR for size in fpga.bars):
        return ok("the BAR of 8 GB has an address")
    if fpga.unassigned_bars:
        sizes = ", ".join(f"{size >> 20} MiB" for size in fpga.unassigned_bars)
        return failed(f"no address for a BAR of {sizes}", _ABOVE_4G)
    if fpga.p2p is False:
        return warning(
            "no BAR of 8 GB, with P2P off", f"turn P2P on; if its driver then says 'no iomem', {_ABOVE_4G}"
        )
    return failed("no BAR of 8 GB", _ABOVE_4G)


def iommu(machine: Machine) -> Finding:
    """No IOMMU translates the card's addresses: where one does, P2P is slow (vendor documents)."""
    return of_cards(machine, _iommu)


def _iommu(one: SmartSsd) -> Finding:
    if not one.fpga.iommu:
        return ok("no IOMMU between card and memory")
    if one.fpga.iommu == PASS_THROUGH:
        return ok("the IOMMU lets the card's addresses pass as they are")
    return warning(
        f"behind an IOMMU, domain {one.fpga.iommu}: P2P is slower",
        "put iommu=pt on the kernel's command line; or turn the IOMMU off there with intel_iommu=off or "
        "amd_iommu=off, or in the BIOS setup (VT-d, AMD-Vi), unless virtual machines or untrusted devices "
        "need it",
    )


def link(machine: Machine) -> Finding:
    """The card's link to the host runs at Gen3 x4, the best that the card has."""
    return of_cards(machine, _link)


def _link(one: SmartSsd) -> Finding:
    # A card without its switch's link, as a virtual machine shows it, has only the function's to go by.
    here = one.uplink or one.fpga.link
    if here is None:
        return warning("the kernel does not say how the link runs", "lspci -vv as root shows LnkSta")
    if here.speed >= CARD_LINK.speed and here.width >= CARD_LINK.width:
        return ok(f"the link runs at {here}")
    return warning(
        f"the link runs at {here}; the card can do {CARD_LINK}",
        "seat it again, or put it into a slot with four Gen3 lanes of its own that no BIOS setting limits",
    )
