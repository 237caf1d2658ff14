"""What a session or a drive has had done, counted as work leaves the queue."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..worker.messages import Traffic
from .express import Run
from .work_queue import Piece


@dataclass
class Usage:
    """Pieces of work, seconds in the queue and on the device, bytes; everything since the beginning.

    ``winners`` are the tokens that evaluations ranked best, for all KV heads; of those, ``missing`` were not
    held by the client.
    """

    pieces: int = 0
    queue_s: float = 0.0
    device_s: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)
    winners: int = 0
    missing: int = 0

    def add(self, piece: Piece, moved: Traffic) -> None:
        """Count a piece of work, and the bytes that it moved."""
        self.pieces += 1
        self.queue_s += piece.queue_s
        self.device_s += piece.service_s
        self.traffic.add(moved)

    def add_run(self, run: Run) -> None:
        """Count evaluations that the express carried."""
        self.pieces += len(run.seconds)
        self.queue_s += sum(run.waited)
        self.device_s += sum(run.seconds)
        self.traffic.add(run.traffic)
        self.rank(run.winners, run.missing)

    def rank(self, winners: int, missing: int) -> None:
        """Count an evaluation's winners."""
        self.winners += winners
        self.missing += missing
