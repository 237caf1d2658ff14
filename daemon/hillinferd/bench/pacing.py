"""What a pool under a profile achieves, against the figures of the profile."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hillinfer_core import kernel
from hillinfer_core.layout import Precision

from ..driver.block import is_block_device
from ..driver.contract import KeySegment, Scan
from ..driver.host import HostDriver
from ..driver.profiles import profile
from ..driver.settings import DriverSettings
from ..driver.storage import aligned

_BLOCK = 64 << 20
_FIRST = 1 << 20
_ROWS = 4096
_SEGMENTS = 16


@dataclass(frozen=True)
class Figure:
    """``expected`` of the profile, and achieved by one client and by four that take turns, in ``unit``."""

    name: str
    unit: str
    expected: float
    one: float
    four: float

    def off(self, achieved: float) -> str:
        """Return how far ``achieved`` is off: per cent of a rate, microseconds of a latency."""
        if self.unit == "us":
            return f"{achieved - self.expected:+.0f} us"
        return f"{(achieved / self.expected - 1) * 100:+.1f}%"


def measure_profile(path: Path, name: str, size: int, seconds: float) -> list[Figure]:
    """Measure a pool at ``path`` of ``size`` bytes (at least 256 MiB) under the profile ``name``.

    Each figure is taken for ``seconds`` with one thread and with four. As in the daemon, one thread at a
    time uses the driver; a latency is that of the driver, without the turn's wait.
    """
    limit = profile(name)
    size = max(size, 256 << 20)
    capacity = 0 if is_block_device(path) else size
    driver = HostDriver(DriverSettings("host", str(path), capacity, True, 1 << 30, name))
    try:
        block = aligned(_BLOCK)
        block[:] = np.random.default_rng(0).integers(0, 256, _BLOCK, np.uint8)
        for offset in range(_FIRST, size - _BLOCK, _BLOCK):
            driver.write(offset, block.data)
        pages = np.random.default_rng(1).permutation((size - 2 * _BLOCK) // 4096)[:_ROWS] * 4096 + _FIRST
        offsets = pages.astype(np.uint64)
        rows = aligned(_ROWS * 4096).reshape(_ROWS, 4096)
        page = aligned(4096).data

        tokens = _BLOCK // _SEGMENTS // 8 // 64
        tiles = block.reshape(_SEGMENTS, 8, tokens // 16, 16 * 64)
        sums = [tuple(kernel.data_checksums(part).tolist()) for part in tiles]
        segments = [
            KeySegment(
                _FIRST + at * (_BLOCK // _SEGMENTS), at * tokens, tokens, 8, 64, Precision.int8, sums[at]
            )
            for at in range(_SEGMENTS)
        ]
        query = np.random.default_rng(2).integers(-127, 128, (8, 1, 64)).astype(np.int8)
        scan = Scan(segments, query, 0, _SEGMENTS * tokens, 256)
        turn = iter(range(1 << 62))

        def at(unit: int) -> int:
            return _FIRST + next(turn) * unit % (size - 2 * _BLOCK)

        def rate(name: str, expected: float, nbytes: int, call: Callable[[], object]) -> Figure:
            one, four = (_run(call, threads, seconds) for threads in (1, 4))
            return Figure(name, "MB/s", expected / 1e6, nbytes / one.each / 1e6, nbytes / four.each / 1e6)

        figures = [
            rate("append", min(limit.nand_write, limit.host_write), _BLOCK,
                 lambda: driver.write(_FIRST + _BLOCK, block.data)),
            rate("read", min(limit.nand_read, limit.host_read), _BLOCK,
                 lambda: driver.read(_FIRST, block.data)),
            rate("evaluate, keys streamed", min(limit.p2p, limit.nand_read), _BLOCK,
                 lambda: driver.evaluate(scan)),
        ]  # fmt: skip
        for segment, part in zip(segments, tiles, strict=True):
            driver.load_keys(segment, part.copy())
        figures.append(rate("evaluate, keys loaded", limit.scan, _BLOCK, lambda: driver.evaluate(scan)))
        one, four = (_run(lambda: driver.gather(offsets, rows), threads, seconds) for threads in (1, 4))
        figures.append(Figure("gather", "rows/s", limit.read_iops, _ROWS / one.each, _ROWS / four.each))
        least = 1e6 * (limit.latency + 1 / limit.read_iops)
        for kind, call in (
            (
                "gather of one row",
                lambda: driver.gather(offsets[:1] + np.uint64(at(4096) - _FIRST), rows[:1]),
            ),
            ("read of a page", lambda: driver.read(at(4096), page)),
        ):
            one, four = (_run(call, threads, seconds) for threads in (1, 4))
            figures.append(
                Figure(f"median latency, {kind}", "us", least, one.median * 1e6, four.median * 1e6)
            )
        return figures
    finally:
        driver.close()


@dataclass(frozen=True)
class _Times:
    each: float  # seconds of wall clock for each call
    median: float  # seconds of a call alone


def _run(call: Callable[[], object], threads: int, seconds: float) -> _Times:
    """Call from ``threads`` that take turns in the order they ask, as the daemon's queue has them do."""
    turn = threading.Condition()
    tickets = iter(range(1 << 62))
    serving = 0
    times: list[float] = []
    started = time.perf_counter()

    def work() -> None:
        nonlocal serving
        # At least once, however late the thread starts.
        while not times or time.perf_counter() - started < seconds:
            with turn:
                ticket = next(tickets)
                turn.wait_for(lambda: serving == ticket)  # noqa: B023
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
            with turn:
                serving += 1
                turn.notify_all()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return _Times((time.perf_counter() - started) / len(times), statistics.median(times))
