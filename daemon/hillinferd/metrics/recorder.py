"""Counts every piece of work as it leaves a drive's queue."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics

from hillinfer_core.errors import HillInferError, name_of

from ..service.drive import Drive
from ..service.work_queue import Piece, Priority
from ..worker.messages import Traffic

SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds of the histograms' buckets: an evaluation takes 0.2 ms to 20 ms. Our choice."""

_WORK = ("drive", "driver", "operation", "class")
_KINDS = ("written", "read", "evaluated", "streamed")

# A second series for each counter, with the time it was made, which nothing here looks at.
disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Bound:
    """The series of one drive, operation and class: looked up once."""

    queue: Histogram
    service: Histogram
    moved: list[tuple[str, Counter]]
    reads: Counter
    writes: Counter


class Recorder:
    """Takes what :meth:`ColdPoolService.observe` tells into ``registry``. One event loop; never blocks."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._queue = Histogram(
            "hillinferd_queue_seconds",
            "Time that work waited for its turn",
            _WORK,
            buckets=SECONDS,
            registry=registry,
        )
        self._service = Histogram(
            "hillinferd_service_seconds",
            "Time that work took on the device, the way to the worker included",
            _WORK,
            buckets=SECONDS,
            registry=registry,
        )
        self._moved = Counter(
            "hillinferd_moved_bytes",
            "Bytes written to and read from the drive; of evaluation keys scanned, and of those streamed",
            (*_WORK, "kind"),
            registry=registry,
        )
        self._requests = Counter(
            "hillinferd_io_requests",
            "Requests to the drive: runs of consecutive bytes",
            (*_WORK, "kind"),
            registry=registry,
        )
        self._errors = Counter(
            "hillinferd_work_errors",
            "Work that failed, by the name of its error; Cancelled: the client left before its turn",
            (*_WORK, "error"),
            registry=registry,
        )
        self._bound: dict[tuple[str, str, Priority | None], _Bound] = {}

    def observe(self, drive: Drive, piece: Piece, moved: Traffic) -> None:
        """Count a piece of work, and what it moved."""
        key = drive.name, piece.operation, piece.priority
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._bind(_labels(drive, piece))
        bound.queue.observe(piece.queue_s)
        bound.service.observe(piece.service_s)
        if moved.reads:
            bound.reads.inc(moved.reads)
        if moved.writes:
            bound.writes.inc(moved.writes)
        for kind, counter in bound.moved:
            if amount := getattr(moved, kind):
                counter.inc(amount)
        if piece.error is not None:
            self._errors.labels(*_labels(drive, piece), _error_name(piece.error)).inc()

    def _bind(self, labels: tuple[str, ...]) -> _Bound:
        return _Bound(
            self._queue.labels(*labels),
            self._service.labels(*labels),
            [(kind, self._moved.labels(*labels, kind)) for kind in _KINDS],
            self._requests.labels(*labels, "read"),
            self._requests.labels(*labels, "write"),
        )


def _labels(drive: Drive, piece: Piece) -> tuple[str, ...]:
    # Work of the daemon itself, such as attaching and freeing, belongs to no class of sessions.
    work = piece.priority.value if piece.priority else "daemon"
    return drive.name, drive.settings.driver.kind, piece.operation, work


def _error_name(error: BaseException) -> str:
    if isinstance(error, HillInferError):
        return name_of(error)
    return "Cancelled" if isinstance(error, asyncio.CancelledError) else "Unexpected"
