"""SmartSSDs: the FPGA's functions, and the NVMe drive on the same card."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .model import CARD_NVME, CARD_SWITCH, FPGA_MANAGEMENT, FPGA_USER, Fpga, Namespace, Problem, SmartSsd
from .sysfs import children, iommu_domain, link_name, memory_bars, number, pci_id, pci_link, text

USER_DRIVER = "xocl"
MANAGEMENT_DRIVER = "xclmgmt"
"""XRT's kernel drivers for the two functions."""


def pair(functions: Iterable[Path], namespaces: Iterable[Namespace]) -> tuple[SmartSsd, ...]:
    """Return the SmartSSDs among PCI ``functions``, each with its own of ``namespaces``, by address.

    An FPGA and an NVMe drive are one card when their nearest common ancestor is the card's own switch; what
    only shares a root port is something else in the machine.
    """
    cards: dict[str, dict[str, Path]] = {}
    for path in functions:
        if (kind := pci_id(path)) in (FPGA_MANAGEMENT, FPGA_USER):
            slot, _, _ = str(path).rpartition(".")
            cards.setdefault(slot, {})[kind] = path
    drives = [drive for drive in namespaces if drive.controller and pci_id(drive.controller) in CARD_NVME]
    return tuple(_card(cards[slot], drives) for slot in sorted(cards))


def _card(functions: dict[str, Path], drives: list[Namespace]) -> SmartSsd:
    fpga = read_fpga(functions.get(FPGA_MANAGEMENT), functions.get(FPGA_USER))
    place = fpga.paths[0]
    mine = [(switch, drive) for drive in drives if (switch := _card_switch(place, drive.controller))]
    mine.sort(key=lambda found: found[1].node)
    controllers = {drive.pci_address for _, drive in mine}
    # With two drives below one switch nothing says which of them the FPGA reads.
    namespace = mine[0][1] if len(controllers) == 1 else None
    problems = [*_fpga_problems(fpga)]
    if len(controllers) > 1:
        problems.append(
            Problem(
                f"several drives lie below its switch: {', '.join(sorted(controllers))}",
                "this is not a SmartSSD as we know it; use the drives with the host driver",
            )
        )
    elif namespace is None:
        problems.append(
            Problem(
                "no NVMe drive lies below its switch",
                "check with lspci -t that the card's drive is there and with lsmod that nvme is loaded; "
                "power the machine off and on if it is not",
            )
        )
    else:
        problems += namespace.problems
    switch = mine[0][0] if mine else _switch_above(place)
    return SmartSsd(fpga, namespace, pci_link(switch) if switch else None, tuple(problems))


def _card_switch(fpga: Path, controller: Path | None) -> Path | None:
    if controller is None:
        return None
    nearest = Path(os.path.commonpath([fpga, controller]))
    return nearest if pci_id(nearest) == CARD_SWITCH else None


def _switch_above(fpga: Path) -> Path | None:
    return next((place for place in fpga.parents if pci_id(place) == CARD_SWITCH), None)


def read_fpga(management: Path | None, user: Path | None) -> Fpga:
    """Return the FPGA with these functions in sysfs, at least one of them given."""
    present = tuple(path for path in (user, management) if path is not None)
    assigned, unassigned = memory_bars(user) if user else ((), ())
    ready = number(user / "ready") if user else None
    p2p = [number(path) for path in children(user, "p2p.*/p2p_enable")] if user else []
    render = children(user, "drm/renderD*") if user else []
    shells = [text(file) for path in present for file in children(path, "rom.*/VBNV")]
    return Fpga(
        management=management.name if management else "",
        user=user.name if user else "",
        management_driver=link_name(management / "driver") if management else "",
        driver=link_name(user / "driver") if user else "",
        render_node=f"/dev/dri/{render[0].name}" if render else "",
        ready=None if ready is None else ready == 1,
        shell=next(filter(None, shells), ""),
        interface_uuids=tuple(text(user / "interface_uuids").split()) if user else (),
        xclbin_uuid=text(user / "xclbinuuid") if user else "",
        # Older drivers also say 2, 6 or 16 for kinds of "not yet" (XRT, xocl_sysfs.c): only 1 is on.
        p2p=p2p[0] == 1 if p2p else None,
        link=pci_link(present[0]),
        bars=assigned,
        unassigned_bars=unassigned,
        iommu=iommu_domain(present[0]),
        paths=present,
    )


def _fpga_problems(fpga: Fpga) -> Iterator[Problem]:
    if not fpga.flashed:
        yield Problem(
            "it is not flashed: it shows no user function" if not fpga.user else "it is not flashed",
            "install the card's platform package, then as root: xbmgmt program --base "
            f"--device {fpga.management or 'MANAGEMENT_ADDRESS'}, and power the machine off and on",
        )
        return
    if fpga.management and fpga.management_driver != MANAGEMENT_DRIVER:
        yield Problem(_bound(fpga.management, fpga.management_driver), _load(MANAGEMENT_DRIVER), blocks=False)
    if fpga.driver != USER_DRIVER:
        yield Problem(_bound(fpga.user, fpga.driver), _load(USER_DRIVER))
        return
    if not fpga.ready:
        yield Problem(
            "its driver does not say that it is ready",
            f"wait some seconds; then xbutil examine --device {fpga.user} and dmesg say more",
        )
    if not fpga.render_node:
        yield Problem("it has no render node in /dev/dri", "look in dmesg for errors of xocl, then reload it")
    if fpga.p2p is False:
        yield Problem(
            "P2P is off: bytes from its drive take a detour through host memory",
            f"as root: xbutil configure --p2p enable --device {fpga.user}, then a warm reboot",
            blocks=False,
        )


def _bound(address: str, driver: str) -> str:
    return f"{address} is bound to {driver}" if driver else f"no driver is bound to {address}"


def _load(driver: str) -> str:
    return f"install XRT, then as root: modprobe {driver}"
