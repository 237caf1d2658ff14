"""Two looks at a daemon's books, and what happened between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hillinfer_core.v1 import cold_pool_pb2 as pb


@dataclass(frozen=True)
class Rates:
    """What a session or a drive had done between two looks: per second, but for the last two.

    ``device_share`` is device seconds per second, for a session on all drives together. ``queue_s`` is the
    mean wait of a piece of work. ``hit_rate`` is how many of the tokens ranked best the client held already.
    The last two are None where there was no work, no evaluation.
    """

    device_share: float
    pieces: float
    evaluated_bytes: float
    read_bytes: float
    written_bytes: float
    queue_s: float | None
    hit_rate: float | None


class _HasUsage(Protocol):
    @property
    def usage(self) -> pb.Usage: ...


def rates_of(before: _HasUsage | None, after: _HasUsage, seconds: float) -> Rates:
    """Return what happened within ``seconds``; ``before`` is None for what was not there then."""
    old, new = before.usage if before else pb.Usage(), after.usage
    pieces, winners = new.pieces - old.pieces, new.winners - old.winners
    return Rates(
        (new.device_s - old.device_s) / seconds,
        pieces / seconds,
        (new.evaluated_bytes - old.evaluated_bytes) / seconds,
        (new.read_bytes - old.read_bytes) / seconds,
        (new.written_bytes - old.written_bytes) / seconds,
        (new.queue_s - old.queue_s) / pieces if pieces else None,
        1 - (new.missing - old.missing) / winners if winners else None,
    )


def session_rates(
    before: pb.StatusResponse, after: pb.StatusResponse
) -> list[tuple[pb.SessionStatus, Rates]]:
    """Return the sessions with an arena, the one with most device time first."""
    known = {session.session_id: session for session in before.sessions}
    seconds = elapsed(before, after)
    found = [
        (session, rates_of(known.get(session.session_id), session, seconds))
        for session in after.sessions
        if session.arena_bytes
    ]
    return sorted(found, key=lambda pair: -pair[1].device_share)


def drive_rates(before: pb.StatusResponse, after: pb.StatusResponse) -> list[tuple[pb.DriveStatus, Rates]]:
    """Return the drives, in the daemon's order."""
    known = {drive.name: drive for drive in before.drives}
    seconds = elapsed(before, after)
    return [(drive, rates_of(known.get(drive.name), drive, seconds)) for drive in after.drives]


def elapsed(before: pb.StatusResponse, after: pb.StatusResponse) -> float:
    """Return the seconds between two answers, by the daemon's clock."""
    return max(after.uptime_s - before.uptime_s, 1e-3)
