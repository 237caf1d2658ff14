"""The daemon's books as metrics, read at the moment somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from ..service.cold_pool import ColdPoolService
from ..service.drive import Drive

_DRIVE = ("drive", "driver")

_Value = Callable[[Drive], float]

_GAUGES: tuple[tuple[str, str, _Value], ...] = (
    ("drive_up", "Whether the drive serves: 1 or 0", lambda drive: drive.worker.up),
    ("waiting", "Pieces of work in the drive's queue", lambda drive: drive.queue.waiting),
    ("pool_capacity_bytes", "Size of the cold pool", lambda drive: drive.catalogue.allocator.capacity),
    ("pool_used_bytes", "What is taken of it", lambda drive: drive.catalogue.allocator.used_bytes),
    ("pool_extents", "Extents that are taken", lambda drive: drive.catalogue.allocator.count),
    ("contexts", "Open contexts that are not lost", lambda drive: drive.open_contexts),
    ("durable_contexts", "Durable contexts", lambda drive: len(drive.catalogue.durables)),
    (
        "durable_bytes",
        "What durable contexts take of the pool",
        lambda drive: sum(durable.extent_bytes for durable in drive.catalogue.durables),
    ),
    ("evaluation_keys_bytes", "Evaluation keys in fast memory", lambda drive: drive.key_bytes),
    (
        "evaluation_keys_limit_bytes",
        "What evaluation keys may take of fast memory",
        lambda drive: drive.worker.identity.key_memory if drive.worker.identity else 0,
    ),
)

_COUNTERS: tuple[tuple[str, str, _Value], ...] = (
    ("worker_restarts", "Attempts to start another device worker", lambda drive: drive.worker.restarts),
    ("winners", "Tokens that evaluations ranked best, for all KV heads", lambda drive: drive.usage.winners),
    ("winners_missing", "Of those, what the client did not hold", lambda drive: drive.usage.missing),
)


class Books(Collector):
    """Collects from ``service``; only to be asked on its event loop."""

    def __init__(self, service: ColdPoolService, version: str) -> None:
        self._service = service
        self._version = version

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily | InfoMetricFamily]:
        """Yield what is true now."""
        sessions = self._service.sessions
        attached = [session for session in sessions if session.arena_fd is not None]
        yield InfoMetricFamily("hillinferd", "The daemon", value={"version": self._version})
        yield _gauge("uptime_seconds", "Time since the daemon began", self._service.uptime_s)
        yield _gauge("draining", "Whether nothing new is taken in: 1 or 0", sessions.drain.on)
        yield _gauge("sessions", "Sessions with an arena", len(attached))
        yield _gauge("requests", "Requests in flight", sum(session.requests for session in sessions))
        yield _gauge("arenas_bytes", "Arenas of all sessions", sum(each.arena.nbytes for each in attached))
        for name, say, value in _GAUGES:
            gauge = GaugeMetricFamily(f"hillinferd_{name}", say, labels=_DRIVE)
            for drive in self._service.drives:
                gauge.add_metric(_of(drive), float(value(drive)))
            yield gauge
        for name, say, value in _COUNTERS:
            counter = CounterMetricFamily(f"hillinferd_{name}", say, labels=_DRIVE)
            for drive in self._service.drives:
                counter.add_metric(_of(drive), float(value(drive)))
            yield counter
        refused = CounterMetricFamily(
            "hillinferd_refused", "Calls and attach requests answered with an error", labels=("error",)
        )
        for error, count in self._service.refused.items():
            refused.add_metric((error,), count)
        yield refused


def _of(drive: Drive) -> tuple[str, str]:
    return drive.name, drive.settings.driver.kind


def _gauge(name: str, say: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"hillinferd_{name}", say, value=float(value))
