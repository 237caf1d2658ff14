"""``hillinferctl sessions`` and ``top``: who uses the drives, and how much."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table

from hillinfer_core.units import format_bytes
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinfer_core.v1.cold_pool_pb2_grpc import ColdPoolStub

from .connection import JsonOption, SocketOption, connected, to_plain
from .console import wide_console
from .rates import Rates, drive_rates, session_rates
from .users import user_name

IntervalOption = Annotated[
    float, typer.Option("--interval", min=0.1, help="seconds over which rates are measured")
]

_RATES = ("queue", "work/s", "evaluated/s", "read/s", "written/s", "hits")
"""Columns of :func:`_rates`."""

_Look = Callable[[], pb.StatusResponse]


def sessions(
    interval: IntervalOption = 1.0, as_json: JsonOption = False, socket: SocketOption = None
) -> None:
    """List who is attached: process, user, contexts, bytes, and rates of the last second."""
    with connected(socket) as (channel, call):
        before, after = _looks(_look(channel, call), interval)
    if as_json:
        print(json.dumps({"sessions": _plain_sessions(before, after)}, indent=2))
    elif found := session_rates(before, after):
        wide_console().print(_sessions(found))
    else:
        print("Nobody is attached.")


def top(
    interval: IntervalOption = 1.0,
    once: Annotated[bool, typer.Option("--once", help="show one interval and end")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="like --once, as one JSON object; sizes are bytes")
    ] = False,
    socket: SocketOption = None,
) -> None:
    """Show drives and sessions by device time, again and again until Ctrl-C."""
    with connected(socket) as (channel, call):
        look = _look(channel, call)
        if as_json:
            print(json.dumps(_plain(*_looks(look, interval)), indent=2))
        elif once or not sys.stdout.isatty():
            wide_console().print(_screen(*_looks(look, interval)))
        else:
            _follow(look, interval)


def _follow(look: _Look, interval: float) -> None:
    before, after = _looks(look, min(interval, 0.2))
    try:
        with Live(_screen(before, after), screen=True, auto_refresh=False) as live:
            while True:
                before, after = after, _later(look, interval)
                live.update(_screen(before, after), refresh=True)
    except KeyboardInterrupt:
        return


def _look(channel: Any, call: Callable[..., Any]) -> _Look:
    stub = ColdPoolStub(channel)  # type: ignore[no-untyped-call]
    return lambda: call(stub.Status, pb.StatusRequest())


def _looks(look: _Look, interval: float) -> tuple[pb.StatusResponse, pb.StatusResponse]:
    return look(), _later(look, interval)


def _later(look: _Look, interval: float) -> pb.StatusResponse:
    time.sleep(interval)
    return look()


def _screen(before: pb.StatusResponse, after: pb.StatusResponse) -> Group:
    state = "draining: nothing new is taken in" if after.draining else "serving"
    head = f" hillinferd {after.version}, up {after.uptime_s:.0f} s, {state}"
    return Group(head, _drives(drive_rates(before, after)), "", _sessions(session_rates(before, after)))


def _drives(found: list[tuple[pb.DriveStatus, Rates]]) -> Table:
    table = Table("drive", "state", "busy", "waiting", *_RATES, "pool used", "keys in DRAM", box=None)
    for drive, rates in found:
        pool, keys = drive.pool, drive.device
        table.add_row(
            drive.name,
            drive.state,
            f"{rates.device_share:.0%}",
            str(drive.waiting),
            *_rates(rates),
            f"{_share(pool.used_bytes, pool.capacity_bytes)} of {format_bytes(pool.capacity_bytes)}",
            format_bytes(keys.evaluation_key_bytes),
        )
    return table


def _sessions(found: list[tuple[pb.SessionStatus, Rates]]) -> Table:
    table = Table("session", "client", "pid", "user", "contexts", "pool", "device", *_RATES, box=None)
    for session, rates in found:
        table.add_row(
            str(session.session_id),
            session.client_name,
            str(session.pid),
            user_name(session.uid),
            str(len(session.contexts)),
            format_bytes(sum(context.extent_bytes for context in session.contexts)),
            f"{rates.device_share:.0%}",
            *_rates(rates),
        )
    return table


def _rates(rates: Rates) -> tuple[str, ...]:
    return (
        "-" if rates.queue_s is None else f"{rates.queue_s * 1e3:.1f} ms",
        f"{rates.pieces:.0f}",
        *(format_bytes(int(each)) for each in (rates.evaluated_bytes, rates.read_bytes, rates.written_bytes)),
        "-" if rates.hit_rate is None else f"{rates.hit_rate:.0%}",
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _plain(before: pb.StatusResponse, after: pb.StatusResponse) -> dict[str, Any]:
    return {
        "version": after.version,
        "uptime_s": after.uptime_s,
        "draining": after.draining,
        "drives": [
            {**to_plain(drive), "rates": asdict(rates)} for drive, rates in drive_rates(before, after)
        ],
        "sessions": _plain_sessions(before, after),
    }


def _plain_sessions(before: pb.StatusResponse, after: pb.StatusResponse) -> list[dict[str, Any]]:
    return [
        {**to_plain(session), "user": user_name(session.uid), "rates": asdict(rates)}
        for session, rates in session_rates(before, after)
    ]
