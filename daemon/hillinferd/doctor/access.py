"""Checks of who may open the devices."""

from __future__ import annotations

import grp
import os
import stat
from collections.abc import Iterator

from .model import Finding, Machine, failed, not_applicable, ok, warning, worst

GROUP = "hillinfer"
"""Group of the system service, which udev rules give the devices to."""


def render_nodes(machine: Machine) -> Finding:
    """The user, and the group of the system service, may open the cards' render nodes."""
    nodes = [card.fpga.render_node for card in machine.cards if card.fpga.render_node]
    return _all(nodes, "no render node of a SmartSSD")


def namespaces(machine: Machine) -> Finding:
    """The user, and the group of the system service, may open the drives; only a drive as pool needs that."""
    spaces = machine.inventory.namespaces if machine.inventory else ()
    # Of a drive in use nobody wants to open the raw device.
    return _all([space.node for space in spaces if space.usable], "no free NVMe namespace")


def _all(nodes: list[str], nothing: str) -> Finding:
    return worst(_findings(nodes)) if nodes else not_applicable(nothing)


def _findings(nodes: list[str]) -> Iterator[Finding]:
    try:
        group = grp.getgrnam(GROUP)
    except KeyError:
        group = None
    for node in nodes:
        try:
            status = os.stat(node)
        except OSError as error:
            yield failed(f"{node}: {error.strerror}", "udevadm trigger makes missing nodes again")
            continue
        mine = os.access(node, os.R_OK | os.W_OK)
        rights = stat.S_IRGRP | stat.S_IWGRP
        service = group is not None and status.st_gid == group.gr_gid and status.st_mode & rights == rights
        give = f'give it to the group with a udev rule: GROUP="{GROUP}", MODE="0660"'
        if mine and (service or group is None):
            yield ok(f"{node}: this user may open it" + (f", and the group {GROUP}" if service else ""))
        elif mine:
            yield warning(
                f"{node}: this user may open it, the group {GROUP} of the system service may not", give
            )
        elif service:
            yield warning(
                f"{node}: this user may not open it, the group {GROUP} may",
                f"use the system service, or: sudo usermod --append --groups {GROUP} $USER, and log in again",
            )
        else:
            yield failed(f"{node}: this user may not open it", f"as root: chown or setfacl {node}, or {give}")
