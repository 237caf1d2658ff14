"""``hillinferctl cec``: planning needs no daemon; bitstreams are managed by the daemon that has the card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hillinfer_core.v1 import admin_pb2 as pb
from hillinfer_core.v1.admin_pb2_grpc import AdminStub

from ..cec.command import plan_command
from .connection import JsonOption, SocketOption, connected, to_plain

TIMEOUT_S = 120.0
"""Longest that a card may take to be loaded and proved, and other work before it. Our choice."""

app = typer.Typer(add_completion=False, no_args_is_help=True, help="The evaluation kernel on the card.")
app.command(name="plan", help="Choose the kernel, and where evaluation keys live, for a model and a card.")(
    plan_command
)

DriveOption = Annotated[
    str, typer.Option("--drive", help="name of the drive (default: the one that has a card)")
]


@app.command(help="Show which bitstreams the cards have and may have.")
def status(drive: DriveOption = "", as_json: JsonOption = False, socket: SocketOption = None) -> None:
    """Print the bitstreams of a drive's card, or of every card."""
    cards = _ask(socket, "CecStatus", pb.CecStatusRequest(drive=drive)).cards
    if as_json:
        print(json.dumps({"cards": [_plain(card) for card in cards]}, indent=2))
    elif cards:
        _show(cards)
    else:
        print("The daemon drives no card: set driver and card in its configuration.")


@app.command(help="Load a bitstream of the catalogue and prove it by its self-test.")
def load(
    name: Annotated[str, typer.Argument(help="a kernel or a file of the catalogue")],
    drive: DriveOption = "",
    as_json: JsonOption = False,
    socket: SocketOption = None,
) -> None:
    """Load the bitstream ``name`` and print what is there then."""
    _changed(_ask(socket, "CecLoad", pb.CecLoadRequest(drive=drive, name=name)).card, as_json)


@app.command(help="Go back to the bitstream that was good before this one.")
def rollback(drive: DriveOption = "", as_json: JsonOption = False, socket: SocketOption = None) -> None:
    """Go back to the bitstream before, and print what is there then."""
    _changed(_ask(socket, "CecRollback", pb.CecRollbackRequest(drive=drive)).card, as_json)


def _ask(socket: Path | None, method: str, request: Any) -> Any:
    with connected(socket) as (channel, call):
        return call(getattr(AdminStub(channel), method), request, TIMEOUT_S)  # type: ignore[no-untyped-call]


def _plain(card: pb.CecCard) -> dict[str, Any]:
    """Return the card as JSON-ready values; what there is not is null."""
    absent = {name: None for name in ("good", "previous") if not card.HasField(name)}
    return {**to_plain(card), "loaded_uuid": card.loaded_uuid or None, **absent}


def _changed(card: pb.CecCard, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_plain(card), indent=2))
    else:
        print(f"{card.good.file} is loaded and passed its self-test.")
        _show([card])


def _show(cards: Sequence[pb.CecCard]) -> None:
    console = Console()
    for card in cards:
        facts = Table(show_header=False, box=None)
        loaded = card.loaded_uuid or "none"
        good = card.good.file if card.HasField("good") else "none; load one with hillinferctl cec load"
        for name, value in (
            (card.drive, f"card {card.card}"),
            ("shells", ", ".join(card.interface_uuids)),
            ("loaded", f"{loaded}{', the last good one' if card.good_loaded else ''}"),
            ("last good", good),
            ("before it", card.previous.file if card.HasField("previous") else "none"),
            ("contexts", f"{card.contexts} open that need it"),
        ):
            facts.add_row(name, value)
        console.print(facts)
        table = Table("bitstream", "kernel", "head dimensions", "for this card", box=None)
        for entry in card.catalogue:
            suits = entry.interface_uuid in card.interface_uuids
            dims = ", ".join(map(str, entry.head_dims))
            table.add_row(entry.file, entry.kernel, dims, "yes" if suits else "no, another shell")
        console.print(table)
