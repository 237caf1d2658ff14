"""Counts every piece of work as it leaves a drive's queue, and tells of it when somebody asks."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from hillinfer_core.errors import HillInferError, name_of

from ..service.drive import Drive
from ..service.express import Run
from ..service.work_queue import Piece, Priority
from ..worker.messages import Traffic

SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds of the histograms' buckets: an evaluation takes 0.2 ms to 20 ms. Our choice."""

_WORK = ("drive", "driver", "operation", "class")
_KINDS = ("written", "read", "evaluated", "streamed")
_BOUNDS = [*(floatToGoString(bound) for bound in SECONDS), "+Inf"]  # type: ignore[no-untyped-call]


class _Times:
    """A histogram of seconds."""

    def __init__(self) -> None:
        self._counts = [0] * len(_BOUNDS)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def add_all(self, seconds: Sequence[float]) -> None:
        for bucket, count in Counter(map(partial(bisect_left, SECONDS), seconds)).items():
            self._counts[bucket] += count
        self.sum += sum(seconds)

    @property
    def buckets(self) -> list[tuple[str, float]]:
        return list(zip(_BOUNDS, map(float, accumulate(self._counts)), strict=True))


class _Series:
    """What one drive has done of one operation and class."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self.queue, self.service = _Times(), _Times()
        self.moved = Traffic()
        self.errors: Counter[str] = Counter()


class Recorder(Collector):
    """Collects what :meth:`ColdPoolService.observe` tells. One event loop; never blocks.

    Numbers of its own and not the library's counters: those lock and check, and there are thousands of
    pieces of work for each time that somebody asks.
    """

    def __init__(self) -> None:
        self._series: dict[tuple[str, str, Priority | None], _Series] = {}

    def observe(self, drive: Drive, piece: Piece, moved: Traffic) -> None:
        """Count a piece of work, and what it moved."""
        series = self._of(drive, piece.operation, piece.priority)
        series.queue.add(piece.queue_s)
        series.service.add(piece.service_s)
        series.moved.add(moved)
        if piece.error is not None:
            series.errors[_error_name(piece.error)] += 1

    def observe_run(self, drive: Drive, run: Run) -> None:
        """Count evaluations that the express carried."""
        series = self._of(drive, "evaluate", Priority.decode)
        series.queue.add_all(run.waited)
        series.service.add_all(run.seconds)
        series.moved.add(run.traffic)

    def _of(self, drive: Drive, operation: str, priority: Priority | None) -> _Series:
        key = drive.name, operation, priority
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series(_labels(drive, operation, priority))
        return series

    def collect(self) -> Iterator[HistogramMetricFamily | CounterMetricFamily]:
        """Yield what was counted so far."""
        yield self._histogram(
            "hillinferd_queue_seconds", "Time that work waited for its turn", lambda each: each.queue
        )
        yield self._histogram(
            "hillinferd_service_seconds",
            "Time that work took on the device, the way to the worker included",
            lambda each: each.service,
        )
        yield self._counter(
            "hillinferd_moved_bytes",
            "Bytes written to and read from the drive; of evaluation keys scanned, and of those streamed",
            "kind",
            lambda each: {kind: getattr(each.moved, kind) for kind in _KINDS},
        )
        yield self._counter(
            "hillinferd_io_requests",
            "Requests to the drive: runs of consecutive bytes",
            "kind",
            lambda each: {"read": each.moved.reads, "write": each.moved.writes},
        )
        yield self._counter(
            "hillinferd_work_errors",
            "Work that failed, by the name of its error; Cancelled: the client left before its turn",
            "error",
            lambda each: each.errors,
        )

    def _histogram(self, name: str, say: str, times: Callable[[_Series], _Times]) -> HistogramMetricFamily:
        family = HistogramMetricFamily(name, say, labels=_WORK)
        for series in self._series.values():
            family.add_metric(series.labels, times(series).buckets, times(series).sum)
        return family

    def _counter(
        self, name: str, say: str, label: str, counts: Callable[[_Series], dict[str, int]]
    ) -> CounterMetricFamily:
        family = CounterMetricFamily(name, say, labels=(*_WORK, label))
        for series in self._series.values():
            for value, count in counts(series).items():
                family.add_metric((*series.labels, value), count)
        return family


def _labels(drive: Drive, operation: str, priority: Priority | None) -> tuple[str, ...]:
    # Work of the daemon itself, such as attaching and freeing, belongs to no class of sessions.
    work = priority.value if priority else "daemon"
    return drive.name, drive.settings.driver.kind, operation, work


def _error_name(error: BaseException) -> str:
    if isinstance(error, HillInferError):
        return name_of(error)
    return "Cancelled" if isinstance(error, asyncio.CancelledError) else "Unexpected"
