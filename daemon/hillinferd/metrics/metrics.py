"""Brings the metrics of a daemon up and down."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from hillinfer_core.protocol import metrics_socket

from .. import __version__
from ..logs import get_logger
from ..service.cold_pool import ColdPoolService
from .books import Books
from .exposition import MetricsSocket, write_file
from .recorder import Recorder

log = get_logger(__name__)

LATENESS_S = 1.0
"""How often the event loop is asked how late it is. Our choice."""

_LATENESS = (1e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_MARGIN = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 7.5, 10.0, 20.0, 40.0)

# A second series for each histogram, with the time it was made, which nothing here looks at.
disable_created_metrics()  # type: ignore[no-untyped-call]


def process_collector(proc: str = "/proc") -> ProcessCollector:
    """Return a collector of this process's own metrics, which asks ``proc``."""
    collector = ProcessCollector(namespace="hillinferd", proc=proc, registry=None)
    # ProcSubset=pid hides /proc/stat, and without the time of boot that it has the collector returns nothing.
    # There is no public way to give it that time but a directory made to look like /proc.
    if not collector._btime:
        collector._btime = int(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))
    return collector


class Metrics:
    """Metrics of ``service`` at ``metrics.sock`` in ``runtime_dir``, and in ``file`` unless it is None."""

    def __init__(self, service: ColdPoolService, runtime_dir: Path, file: Path | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Books(service, __version__))
        self._registry.register(process_collector())
        self._lateness = Histogram(
            "hillinferd_loop_lateness_seconds",
            "How much later than asked for the event loop, which also feeds the watchdog, went on",
            buckets=_LATENESS,
            registry=self._registry,
        )
        self._margin = Histogram(
            "hillinferd_watchdog_margin_seconds",
            "What was left of WatchdogSec when the watchdog was fed again",
            buckets=_MARGIN,
            registry=self._registry,
        )
        recorder = Recorder()
        self._registry.register(recorder)
        service.observe(recorder.observe, recorder.observe_run)
        self._socket = MetricsSocket(metrics_socket(runtime_dir), self.render)
        self._file = file
        self._tasks: list[asyncio.Task[None]] = []

    def fed(self, margin_s: float) -> None:
        """Note that the watchdog was fed with ``margin_s`` seconds to go."""
        self._margin.observe(margin_s)

    def render(self) -> bytes:
        """Return all metrics as text; on the event loop of the service."""
        return generate_latest(self._registry)

    async def start(self) -> None:
        """Begin to serve; a daemon that cannot tell its metrics says so and serves without."""
        try:
            await self._socket.start()
        except OSError as error:
            log.error("no metrics: their socket cannot be made", error=error)
        self._tasks = [asyncio.create_task(self._ask_lateness())]
        if self._file is not None:
            self._tasks.append(asyncio.create_task(write_file(self._file, self.render)))

    async def stop(self) -> None:
        """Stop serving, and remove the file: what it said is not so any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._socket.stop()
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    async def _ask_lateness(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LATENESS_S
            await asyncio.sleep(LATENESS_S)
            self._lateness.observe(max(0.0, loop.time() - due))
