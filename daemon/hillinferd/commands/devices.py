"""``hillinferctl devices`` and ``doctor``: what is there, and what is wrong with it; no daemon needed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hillinfer_core.units import format_bytes

from ..config import SMALLEST_POOL, embedded_pool_dir, load
from ..discovery.inventory import scan
from ..discovery.model import Inventory, Link, Namespace, Problem, SmartSsd
from ..discovery.udev import UdevUnavailable
from ..doctor.examine import examine
from ..doctor.model import Check, Machine, Verdict
from .connection import SocketOption
from .console import wide_console
from .daemon_check import look_at_daemon

NOTHING = (
    "No NVMe drive and no SmartSSD was found. None is needed: "
    "hillinferd --pool FILE keeps the cold pool in any file, on any drive."
)

app = typer.Typer()


@app.command(help="List NVMe namespaces and SmartSSDs, and what keeps them from being used.")
def devices(
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object; sizes are bytes")] = False,
) -> None:
    """Print what discovery finds; raises :class:`UdevUnavailable`."""
    found = scan()
    if as_json:
        print(json.dumps(to_plain(found), indent=2))
    else:
        _show_devices(found, wide_console())


@app.command(help="Check what the daemon needs of this machine; exit code 1 if something failed.")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    pool: Annotated[
        Path | None,
        typer.Option(
            "--pool", help="file, directory or block device of the cold pool (default: the daemon's)"
        ),
    ] = None,
    socket: SocketOption = None,
) -> None:
    """Print all checks; exit code 1 if one failed."""
    inventory, trouble = None, ""
    try:
        inventory = scan()
    except UdevUnavailable as error:
        trouble = str(error)
    daemon, its_pool = look_at_daemon(socket)
    where = (pool or its_pool or embedded_pool_dir()).expanduser().absolute()
    daemons_pool = pool is None and its_pool is not None
    machine = Machine(
        inventory, trouble, where, SMALLEST_POOL, load(None, {}).limits.arena_limit, daemons_pool
    )
    checks = [daemon, *examine(machine)]
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _show_checks(checks, wide_console())
    if any(check.verdict == Verdict.FAILED for check in checks):
        raise typer.Exit(1)


def to_plain(found: Inventory) -> dict[str, Any]:
    """Return the inventory as JSON-ready values; sizes in bytes, a card's namespace by its node."""
    return {
        "namespaces": [_plain_namespace(space) for space in found.namespaces],
        "smartssds": [_plain_card(card) for card in found.cards],
    }


def _plain_namespace(space: Namespace) -> dict[str, Any]:
    return {
        "node": space.node,
        "model": space.model,
        "serial": space.serial,
        "size_bytes": space.size,
        "block_bytes": space.block_size,
        "pci_address": space.pci_address,
        "signature": space.signature,
        "usable": space.usable,
        "problems": [asdict(problem) for problem in space.problems],
    }


def _plain_card(card: SmartSsd) -> dict[str, Any]:
    fpga = card.fpga
    return {
        "address": fpga.address,
        "management": fpga.management,
        "user": fpga.user,
        "management_driver": fpga.management_driver,
        "driver": fpga.driver,
        "render_node": fpga.render_node,
        "flashed": fpga.flashed,
        "ready": fpga.ready,
        "shell": fpga.shell,
        "interface_uuids": list(fpga.interface_uuids),
        "xclbin_uuid": fpga.xclbin_uuid,
        "p2p": fpga.p2p,
        "link": asdict(fpga.link) if fpga.link else None,
        "uplink": asdict(card.uplink) if card.uplink else None,
        "namespace": card.namespace.node if card.namespace else None,
        "usable": card.usable,
        "problems": [asdict(problem) for problem in card.problems],
    }


def _show_devices(found: Inventory, console: Console) -> None:
    if not found.namespaces and not found.cards:
        console.print(NOTHING, soft_wrap=True)
        return
    if found.namespaces:
        table = Table("namespace", "model", "serial", "size", "block", "PCI", "usable", box=None)
        for space in found.namespaces:
            table.add_row(
                space.node,
                space.model,
                space.serial,
                format_bytes(space.size),
                format_bytes(space.block_size),
                space.pci_address or "-",
                _yes(space.usable),
            )
        console.print(table)
    if found.cards:
        table = Table("SmartSSD", "namespace", "render node", "ready", "P2P", "link", "usable", box=None)
        for card in found.cards:
            fpga = card.fpga
            table.add_row(
                fpga.address,
                card.namespace.node if card.namespace else "-",
                fpga.render_node or "-",
                _yes(fpga.ready),
                _yes(fpga.p2p),
                _link(card.uplink or fpga.link),
                _yes(card.usable),
            )
        console.print()
        console.print(table)
    in_cards = {card.namespace.node for card in found.cards if card.namespace}
    _show_problems(
        [(space.node, space.problems) for space in found.namespaces if space.node not in in_cards]
        + [(card.fpga.address, card.problems) for card in found.cards],
        console,
    )


def _show_problems(devices: Iterable[tuple[str, tuple[Problem, ...]]], console: Console) -> None:
    for name, problems in devices:
        for problem in problems:
            console.print(f"\n{name}: {problem.text}\n  {problem.remedy}", soft_wrap=True)


def _show_checks(checks: Iterable[Check], console: Console) -> None:
    table = Table("check", "verdict", "found", box=None)
    for check in checks:
        table.add_row(check.name, check.verdict, check.detail)
    console.print(table)
    for check in checks:
        if check.remedy:
            console.print(f"\n{check.name}: {check.remedy}", soft_wrap=True)


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown"}[value]


def _link(link: Link | None) -> str:
    return str(link) if link else "unknown"
