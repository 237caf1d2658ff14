"""``hillinferctl contexts``: durable contexts, listed and deleted."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from hillinfer_core.units import format_bytes
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinfer_core.v1.cold_pool_pb2_grpc import ColdPoolStub

from .connection import JsonOption, SocketOption, connected, to_plain
from .console import wide_console
from .users import group_name, user_name

DELETE_TIMEOUT_S = 60.0
"""Longest that a deletion may take: its space is discarded on the drive. Our choice."""

app = typer.Typer(add_completion=False, help="Durable contexts, which outlive their application.")


@app.callback(invoke_without_command=True)
def list_contexts(context: typer.Context, as_json: JsonOption = False, socket: SocketOption = None) -> None:
    """List the durable contexts that you may begin with; those of every user for root."""
    if context.invoked_subcommand is not None:
        return
    with connected(socket) as (channel, call):
        found = call(ColdPoolStub(channel).ListContexts, pb.ListContextsRequest())  # type: ignore[no-untyped-call]
    if as_json:
        print(json.dumps(to_plain(found), indent=2))
        return
    table = Table("name", "user", "group", "state", "tokens", "size", "shape", "used by", "made")
    for item in found.contexts:
        table.add_row(
            item.name,
            user_name(item.uid),
            group_name(item.gid) if item.HasField("gid") else "-",
            "saved" if item.saved else "not saved",
            f"{item.tokens:,}",
            format_bytes(item.extent_bytes),
            f"{item.layers} x {item.kv_heads} x {item.head_dim}",
            str(item.users),
            datetime.fromtimestamp(item.created_unix_s, UTC).strftime("%Y-%m-%d %H:%M"),
        )
    wide_console().print(table if found.contexts else "no durable contexts")


@app.command("delete")
def delete(
    name: Annotated[str, typer.Argument(help="name of the context")],
    uid: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="user that it belongs to (default: you)")
    ] = None,
    as_json: JsonOption = False,
    socket: SocketOption = None,
) -> None:
    """Delete a durable context that nobody has open, and free its space."""
    request = pb.DeleteContextRequest(name=name, uid=os.getuid() if uid is None else uid)
    with connected(socket) as (channel, call):
        stub = ColdPoolStub(channel)  # type: ignore[no-untyped-call]
        done = call(stub.DeleteContext, request, DELETE_TIMEOUT_S)
    if as_json:
        print(json.dumps(to_plain(done)))
    else:
        print(f"deleted {name}: {format_bytes(done.freed_bytes)} freed")
