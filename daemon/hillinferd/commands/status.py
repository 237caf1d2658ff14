"""``hillinferctl status``."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from hillinfer_core.units import format_bytes
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinfer_core.v1.cold_pool_pb2_grpc import ColdPoolStub

from .connection import JsonOption, SocketOption, connected, to_plain
from .console import wide_console
from .users import user_name


def status(as_json: JsonOption = False, socket: SocketOption = None) -> None:
    """Show the drives, the cold pool and who uses it."""
    with connected(socket) as (channel, call):
        response = call(ColdPoolStub(channel).Status, pb.StatusRequest())  # type: ignore[no-untyped-call]
    if as_json:
        print(json.dumps(to_plain(response), indent=2))
    else:
        _show(response, wide_console())


def _show(response: pb.StatusResponse, console: Console) -> None:
    console.print(f" hillinferd {response.version}, up {response.uptime_s:.0f} s")
    if response.draining:
        console.print(" draining: new sessions and contexts are refused; hillinferctl undrain ends this")
    for drive in response.drives:
        console.print(_facts(drive))
        if drive.reason:
            console.print(f" {drive.name} is gone: {drive.reason}", markup=False, highlight=False)
    sessions = Table("session", "client", "pid", "user", "arena", "contexts", "tokens", "extents")
    # Whoever only asks, such as this command, uses nothing.
    for session in (each for each in response.sessions if each.arena_bytes):
        sessions.add_row(
            str(session.session_id),
            session.client_name,
            str(session.pid),
            user_name(session.uid),
            format_bytes(session.arena_bytes),
            str(len(session.contexts)),
            str(sum(context.tokens for context in session.contexts)),
            format_bytes(sum(context.extent_bytes for context in session.contexts)),
        )
    console.print(sessions)


def _facts(drive: pb.DriveStatus) -> Table:
    device, pool, size = drive.device, drive.pool, format_bytes
    keys, limit = device.evaluation_key_bytes, device.evaluation_key_limit_bytes
    direct = "yes" if device.direct_io else "no"
    paced = "" if device.profile in ("", "none") else f", paced as {device.profile}"
    facts = Table(show_header=False, box=None)
    for name, value in (
        (drive.name, f"{drive.state}: {device.driver}, {device.path}, direct I/O {direct}{paced}"),
        ("worker", f"pid {device.worker_pid}, restarted {device.worker_restarts} times"),
        ("cold pool", f"{size(pool.used_bytes)} of {size(pool.capacity_bytes)} in {pool.extents} extents"),
        ("durable", f"{drive.durable_contexts} contexts, {size(drive.durable_bytes)}"),
        ("written, read", f"{size(device.written_bytes)}, {size(device.read_bytes)}"),
        (
            "evaluation keys",
            f"{size(keys)} of {size(limit)}; {size(device.evaluated_bytes)} scanned, "
            f"{size(device.streamed_bytes)} of that streamed",
        ),
    ):
        facts.add_row(name, value)
    return facts
