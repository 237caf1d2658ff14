"""What ``hillinferctl cec status|load|rollback`` ask of the daemon and print; the stub is passed in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from hillinfer_core.v1 import admin_pb2


class AdminStub(Protocol):
    """The calls of ``hillinfer.v1.Admin``, with deadline and token seen to; typed errors come out."""

    def CecStatus(self, request: admin_pb2.CecStatusRequest) -> admin_pb2.CecStatusResponse:  # noqa: N802
        """Ask for every card."""
        ...

    def CecLoad(self, request: admin_pb2.CecLoadRequest) -> admin_pb2.CecLoadResponse:  # noqa: N802
        """Load a bitstream."""
        ...

    def CecRollback(  # noqa: N802
        self, request: admin_pb2.CecRollbackRequest
    ) -> admin_pb2.CecRollbackResponse:
        """Go back to the one before."""
        ...


def status(stub: AdminStub, *, as_json: bool, console: Console) -> None:
    """Print the bitstreams of every card."""
    cards = list(stub.CecStatus(admin_pb2.CecStatusRequest()).cards)
    if as_json:
        _print_json({"cards": [to_plain(card) for card in cards]})
    elif cards:
        _show(cards, console)
    else:
        console.print("The daemon drives no card: set driver and card in its configuration.")


def load(stub: AdminStub, name: str, card: str, *, as_json: bool, console: Console) -> None:
    """Load the bitstream ``name`` onto ``card`` ("" for the only one) and print what is there then."""
    _changed(stub.CecLoad(admin_pb2.CecLoadRequest(card=card, name=name)).card, as_json, console)


def rollback(stub: AdminStub, card: str, *, as_json: bool, console: Console) -> None:
    """Go back to the bitstream before, and print what is there then."""
    _changed(stub.CecRollback(admin_pb2.CecRollbackRequest(card=card)).card, as_json, console)


def to_plain(card: admin_pb2.CecCard) -> dict[str, Any]:
    """Return the card's message as JSON-ready values; a bitstream that there is not is null."""
    return {
        "card": card.card,
        "interface_uuids": list(card.interface_uuids),
        "loaded_uuid": card.loaded_uuid or None,
        "good_loaded": card.good_loaded,
        "good": _plain(card.good) if card.HasField("good") else None,
        "previous": _plain(card.previous) if card.HasField("previous") else None,
        "catalogue": [_plain(entry) for entry in card.catalogue],
        "contexts": card.contexts,
    }


def _plain(entry: admin_pb2.Bitstream) -> dict[str, Any]:
    return {
        "file": entry.file,
        "sha256": entry.sha256,
        "kernel": entry.kernel,
        "head_dims": list(entry.head_dims),
        "interface_uuid": entry.interface_uuid,
    }


def _changed(card: admin_pb2.CecCard, as_json: bool, console: Console) -> None:
    if as_json:
        _print_json(to_plain(card))
    else:
        console.print(f"{card.good.file} is loaded and passed its self-test.", markup=False)
        _show([card], console)


def _show(cards: Sequence[admin_pb2.CecCard], console: Console) -> None:
    for card in cards:
        facts = Table(show_header=False, box=None)
        loaded = card.loaded_uuid or "none"
        good = card.good.file if card.HasField("good") else "none; load one with hillinferctl cec load"
        for name, value in (
            ("card", card.card),
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


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))
