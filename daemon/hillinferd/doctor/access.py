"""Checks of who may open the devices."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterator

from .model import Finding, Machine, failed, not_applicable, ok, warning, worst

SERVICE = "hillinfer"
"""User of the system service, whom udev rules give the devices to; and the group of those who may attach."""


def render_nodes(machine: Machine) -> Finding:
    """The user, and the user of the system service, may open the cards' render nodes."""
    nodes = [card.fpga.render_node for card in machine.cards if card.fpga.render_node]
    return _all(nodes, "no render node of a SmartSSD")


def namespaces(machine: Machine) -> Finding:
    """The user, and the user of the system service, may open the drives; only a drive as pool needs that."""
    spaces = machine.inventory.namespaces if machine.inventory else ()
    # Of a drive in use nobody wants to open the raw device.
    return _all([space.node for space in spaces if space.usable], "no free NVMe namespace")


def _all(nodes: list[str], nothing: str) -> Finding:
    return worst(_findings(nodes)) if nodes else not_applicable(nothing)


def _findings(nodes: list[str]) -> Iterator[Finding]:
    give = f'give it to the service alone with a udev rule: OWNER="{SERVICE}", MODE="0600"'
    owner, group = _ids()
    for node in nodes:
        try:
            status = os.stat(node)
        except OSError as error:
            yield failed(f"{node}: {error.strerror}", "udevadm trigger makes missing nodes again")
            continue
        mine = os.access(node, os.R_OK | os.W_OK)
        rights = stat.S_IRUSR | stat.S_IWUSR
        service = status.st_uid == owner and status.st_mode & rights == rights
        if status.st_gid == group and status.st_mode & (stat.S_IRGRP | stat.S_IWGRP):
            yield warning(
                f"{node}: the group {SERVICE} may open it, so all who may attach can read and change "
                "what the daemon keeps there for others",
                give,
            )
        elif mine and (service or owner is None):
            yield ok(f"{node}: this user may open it" + (f", and the user {SERVICE}" if service else ""))
        elif mine:
            yield warning(
                f"{node}: this user may open it, the user {SERVICE} of the system service may not", give
            )
        elif service:
            yield warning(
                f"{node}: this user may not open it, the user {SERVICE} may",
                "use the system service; a daemon of your own needs a drive of its own",
            )
        else:
            yield failed(f"{node}: this user may not open it", f"as root: chown or setfacl {node}, or {give}")


def _ids() -> tuple[int | None, int | None]:
    """Numbers of the service's user and group, None for what there is not."""
    try:
        return pwd.getpwnam(SERVICE).pw_uid, grp.getgrnam(SERVICE).gr_gid
    except KeyError:
        return None, None
