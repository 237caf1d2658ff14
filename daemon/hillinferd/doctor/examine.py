"""All checks, in the order in which they are shown."""

from __future__ import annotations

from . import access, card, host
from .model import Check, Machine

CHECKS = {
    "discovery": host.discovery,
    "card": card.card,
    "p2p": card.p2p,
    "above 4G": card.above_4g,
    "iommu": card.iommu,
    "pcie link": card.link,
    "xrt": host.xrt,
    "render nodes": access.render_nodes,
    "namespaces": access.namespaces,
    "direct I/O": host.direct_io,
    "free space": host.free_space,
    "memory lock": host.memory_lock,
    "processor": host.processor,
}


def examine(machine: Machine) -> tuple[Check, ...]:
    """Run every check; blocks for up to 20 s if importing pyxrt hangs, else well under a second."""
    found = {name: check(machine) for name, check in CHECKS.items()}
    return tuple(Check(name, one.verdict, one.detail, one.remedy) for name, one in found.items())
