"""``hillinferctl drain``, ``undrain`` and ``close``, for root, the daemon's user and ``admin_groups``."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from hillinfer_core.v1 import admin_pb2 as pb
from hillinfer_core.v1.admin_pb2_grpc import AdminStub

from .connection import JsonOption, SocketOption, connected, to_plain
from .users import user_name

_POLL_S = 0.5


def drain(
    wait: Annotated[
        float, typer.Option("--wait", min=0, help="seconds to wait for the open sessions to end")
    ] = 0.0,
    as_json: JsonOption = False,
    socket: SocketOption = None,
) -> None:
    """Refuse new sessions and contexts, let the open ones go on; exit code 1 if --wait was too short."""
    until = time.monotonic() + wait
    with connected(socket) as (channel, call):
        stub = AdminStub(channel)  # type: ignore[no-untyped-call]
        state = call(stub.Drain, pb.DrainRequest(on=True))
        while state.sessions and time.monotonic() < until:
            time.sleep(_POLL_S)
            state = call(stub.Drain, pb.DrainRequest(on=True))
    _show(state, as_json)
    if wait and state.sessions:
        raise typer.Exit(1)


def undrain(as_json: JsonOption = False, socket: SocketOption = None) -> None:
    """Take in new sessions and contexts again."""
    with connected(socket) as (channel, call):
        state = call(AdminStub(channel).Drain, pb.DrainRequest(on=False))  # type: ignore[no-untyped-call]
    _show(state, as_json)


def close(
    session: Annotated[
        int,
        typer.Argument(min=0, max=2**64 - 1, help="number of the session, as hillinferctl sessions has it"),
    ],
    as_json: JsonOption = False,
    socket: SocketOption = None,
) -> None:
    """End a session: its work fails, its volatile contexts are freed; durable ones stay."""
    with connected(socket) as (channel, call):
        stub = AdminStub(channel)  # type: ignore[no-untyped-call]
        done = call(stub.CloseSession, pb.CloseSessionRequest(session_id=session))
    if as_json:
        print(json.dumps(to_plain(done), indent=2))
    else:
        print(f"closed session {session}: {done.client_name}, pid {done.pid}, user {user_name(done.uid)}")


def _show(state: pb.DrainResponse, as_json: bool) -> None:
    if as_json:
        print(json.dumps(to_plain(state), indent=2))
        return
    open_ones = f"{state.sessions} sessions with {state.contexts} contexts"
    if not state.on:
        print(f"Serving: new sessions and contexts are taken in; {open_ones} are open.")
    elif state.sessions:
        print(f"Draining: nothing new is taken in; {open_ones} go on, {state.requests} requests in flight.")
    else:
        print("Drained: nothing new is taken in, and nobody is attached. hillinferctl undrain ends this.")
