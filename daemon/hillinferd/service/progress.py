"""Whether the drives' work and supervision move: what the watchdog of the daemon depends on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from .drive import Drive
from .supervisor import PREPARE_TIMEOUT_S, START_TIMEOUT_S

GRACE_S = 15.0
"""Seconds that work may stand still beyond what a worker may take: it is replaced by then. Our choice."""


class Progress:
    """Watches ``drives``; ``clock`` counts seconds and never goes back.

    A worker that hangs is not a stand-still: it is replaced, and until then it is within its time.
    """

    def __init__(self, drives: Sequence[Drive], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen = {drive: (_marks(drive), clock()) for drive in drives}

    def stalled(self) -> str:
        """Return what stands still for longer than it may, empty if nothing does; to be asked regularly."""
        now = self._clock()
        for drive, (before, since) in self._seen.items():
            if not drive.supervised:
                return f"drive {drive.name} is not supervised any more"
            marks = _marks(drive)
            if marks != before or not drive.queue.busy:
                self._seen[drive] = marks, now
            elif now - since > _patience_s(drive):
                return f"work for drive {drive.name} stands still since {now - since:.0f} s"
        return ""


def _marks(drive: Drive) -> tuple[int, int, int]:
    return drive.queue.done, drive.worker.exchanges, drive.worker.restarts


def _patience_s(drive: Drive) -> float:
    return max(drive.settings.request_timeout_s, START_TIMEOUT_S, PREPARE_TIMEOUT_S) + GRACE_S
