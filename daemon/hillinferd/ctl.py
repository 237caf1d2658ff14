"""``hillinferctl``: asks a running daemon, and plans for a card without one."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import MutableSequence
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from hillinfer_core.errors import DaemonUnavailable, HillInferError, by_name
from hillinfer_core.protocol import (
    ERROR_KEY,
    LAYOUT_VERSION,
    MAX_PACKET,
    PROTOCOL_VERSION,
    TOKEN_KEY,
    attach_socket,
    default_runtime_dir,
)
from hillinfer_core.units import format_bytes
from hillinfer_core.v1 import attach_pb2, cold_pool_pb2, cold_pool_pb2_grpc

from .cec.command import app as cec_app
from .devices_command import app as devices_app

TIMEOUT_S = 10.0
"""Longest that the daemon may take to answer; status waits for nothing there. Our choice."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Ask a running hillinferd, or plan for a card without one.",
)
app.add_typer(cec_app, name="cec")
app.add_typer(devices_app)


@app.command(help="Show the device, the cold pool and who uses it.")
def status(
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object; sizes are bytes")] = False,
    socket_path: Annotated[
        Path | None,
        typer.Option("--socket", help="attach socket (default: in the runtime directory)"),
    ] = None,
) -> None:
    """Print the status as JSON or as tables."""
    response = fetch_status(socket_path or attach_socket(default_runtime_dir()))
    if as_json:
        print(json.dumps(to_plain(response), indent=2))
    else:
        _show(response, Console())


def main() -> None:
    """Run ``hillinferctl``; an error that says what to do ends it with one line and exit code 1."""
    try:
        app()
    except HillInferError as error:
        print(f"hillinferctl: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def fetch_status(path: Path) -> cold_pool_pb2.StatusResponse:
    """Return the status of the daemon at the attach socket ``path``; blocks for at most 20 s.

    Raises :class:`DaemonUnavailable` if none answers, else the daemon's own typed error.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(TIMEOUT_S)
        try:
            connection.connect(str(path))
            request = attach_pb2.AttachRequest(
                protocol_version=PROTOCOL_VERSION, layout_version=LAYOUT_VERSION, client_name="hillinferctl"
            )
            connection.send(request.SerializeToString())
            reply = attach_pb2.AttachReply.FromString(connection.recv(MAX_PACKET))
        except OSError as error:
            raise DaemonUnavailable(
                f"no daemon answers at {path} ({error.strerror or error}); "
                "start hillinferd, or name its socket with --socket"
            ) from None
        if not reply.HasField("accepted"):
            raise by_name(reply.refused.error)(reply.refused.message or f"the daemon at {path} hung up")
        return _ask(reply.accepted)


def _ask(accepted: attach_pb2.Accepted) -> cold_pool_pb2.StatusResponse:
    with grpc.insecure_channel(accepted.grpc_address) as channel:
        stub = cold_pool_pb2_grpc.ColdPoolStub(channel)  # type: ignore[no-untyped-call]
        try:
            response: cold_pool_pb2.StatusResponse = stub.Status(
                cold_pool_pb2.StatusRequest(), timeout=TIMEOUT_S, metadata=((TOKEN_KEY, accepted.token),)
            )
            return response
        except grpc.RpcError as error:
            raise _typed(error) from None


def _typed(error: grpc.RpcError) -> HillInferError:
    if not isinstance(error, grpc.Call):
        return DaemonUnavailable(str(error))
    name = next((value for key, value in error.trailing_metadata() or () if key == ERROR_KEY), None)
    kind = by_name(str(name)) if name else DaemonUnavailable
    return kind(error.details() or "the daemon does not answer")


def to_plain(message: Message) -> dict[str, Any]:
    """Return ``message`` as JSON-ready values: every field present, integers as integers, enums by name."""
    plain: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        plain[field.name] = (
            [_value(field, item) for item in value]
            if isinstance(value, MutableSequence)
            else _value(field, value)
        )
    return plain


def _value(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return to_plain(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value


def _show(response: cold_pool_pb2.StatusResponse, console: Console) -> None:
    device, pool, size = response.device, response.pool, format_bytes
    keys, limit = device.evaluation_key_bytes, device.evaluation_key_limit_bytes
    direct = "yes" if device.direct_io else "no"
    facts = Table(show_header=False, box=None)
    for name, value in (
        ("daemon", f"{response.version}, up {response.uptime_s:.0f} s"),
        ("device", f"{device.driver}, {device.path}, direct I/O {direct}"),
        ("worker", f"pid {device.worker_pid}, restarted {device.worker_restarts} times"),
        ("cold pool", f"{size(pool.used_bytes)} of {size(pool.capacity_bytes)} in {pool.extents} extents"),
        ("written, read", f"{size(device.written_bytes)}, {size(device.read_bytes)}"),
        ("evaluation keys", f"{size(keys)} of {size(limit)}, {size(device.evaluated_bytes)} scanned"),
    ):
        facts.add_row(name, value)
    console.print(facts)
    sessions = Table("session", "client", "pid", "uid", "arena", "contexts", "tokens", "extents")
    for session in response.sessions:
        sessions.add_row(
            str(session.session_id),
            session.client_name,
            str(session.pid),
            str(session.uid),
            format_bytes(session.arena_bytes),
            str(len(session.contexts)),
            str(sum(context.tokens for context in session.contexts)),
            format_bytes(sum(context.extent_bytes for context in session.contexts)),
        )
    console.print(sessions)


if __name__ == "__main__":
    main()
