"""Runs the systems in turn, step by step, and tells what each took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch

from hillinfer.bench.kvpath.rig import Rig
from hillinfer.bench.kvpath.systems import SYSTEMS
from hillinfer.bench.kvpath.systems.base import System
from hillinfer.evaluation import Brought, EvaluateItem
from hillinfer.hkm.cache import HierarchicalCache
from hillinfer.hkm.decode import bring
from hillinfer.progress import Progress
from hillinfer.session import Session
from hillinfer.simulate.machine import Machine
from hillinfer_core.errors import InvalidInput
from hillinfer_core.units import Budget

WARM_UP = 24
"""Steps of each system that are not counted: slots and hot pool fill, and layers are tried divided or not."""


@dataclass(frozen=True)
class Row:
    """One system. Times are of one layer, from its query to staged KV.

    miss_rate: share of the selected rows that came from the drive; None where nothing is selected.
    moved_bytes, ios: read from the drive for a layer, mean; missing rows of neighbouring tokens count
    as one request, ranges as requests of 128 KiB.
    spread_ms: least and greatest median of the rounds. drive_ms: of it, what the modelled SmartSSD needs for
    these bytes and requests, one after another; the rest is this machine's.
    """

    system: str
    budget: str
    kvpath_ms: float
    p99_ms: float
    spread_ms: tuple[float, float]
    miss_rate: float | None
    moved_bytes: int
    ios: int
    resident_bytes: int
    drive_ms: float


class _Watched:
    """A system, and what was last asked of it and brought."""

    def __init__(self, system: System) -> None:
        self._system = system
        self.latest: list[tuple[EvaluateItem, Brought]] = []

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        brought = self._system.select(session, layer, items)
        self.latest = [] if brought is None else list(zip(items, brought, strict=True))
        return brought

    def requests(self) -> int:
        """Count the runs of neighbouring tokens whose rows were missing: the drive reads each at once."""
        count = 0
        for item, brought in self.latest:
            for head, ids in enumerate(brought.ids):
                missing = np.setdiff1d(ids, item.held[head])
                count += int(np.count_nonzero(np.diff(missing) != 1)) + bool(len(missing))
        return count


class _Running:
    """A system at work on its own cache."""

    def __init__(self, rig: Rig, system: System, budget: Budget) -> None:
        self.system, self.budget, self.rig = system, budget, rig
        self.watched = _Watched(system)
        self.cache: HierarchicalCache = rig.cache(budget, self.watched, system.hot_pool)
        self.times: list[list[float]] = []
        self.read_bytes = self.evaluated_bytes = self.requests = 0

    def round(self, steps: range) -> None:
        """Take the workload's `steps`; the times of all layers are kept together."""
        counters, times = self.rig.session.counters, []
        before, evaluated = counters.read_bytes, counters.evaluated_bytes
        for step in steps:
            for number, layer in enumerate(self.cache.full_layers):
                query = torch.from_numpy(self.rig.workload.queries[step, number])[None, :, None]
                started = time.perf_counter()
                bring(layer, query, self.rig.workload.shape.head_dim**-0.5)
                times.append(time.perf_counter() - started)
                self.requests += self.watched.requests()
                # What a step does while its attention computes, and after.
                layer.pools.settle()
                self.cache.account()
        self.times.append(times)
        self.read_bytes += counters.read_bytes - before
        self.evaluated_bytes += counters.evaluated_bytes - evaluated

    def forget_warm_up(self) -> None:
        self.times.clear()
        self.read_bytes = self.evaluated_bytes = self.requests = 0
        if self.system.stream is not None:
            self.system.stream.ios = 0
        self.cache.tally.selected = self.cache.tally.brought = 0

    def row(self) -> Row:
        tally = self.cache.tally
        every = [each for times in self.times for each in times]
        ranges = 0 if self.system.stream is None else self.system.stream.ios
        medians = [statistics.median(times) for times in self.times]
        return Row(
            system=self.system.name,
            budget=str(self.budget),
            kvpath_ms=round(statistics.median(every) * 1e3, 3),
            p99_ms=round(float(np.quantile(every, 0.99)) * 1e3, 3),
            spread_ms=(round(min(medians) * 1e3, 3), round(max(medians) * 1e3, 3)),
            miss_rate=round(tally.brought / tally.selected, 4) if tally.selected else None,
            moved_bytes=self.read_bytes // len(every),
            ios=(self.requests + ranges) // len(every),
            resident_bytes=tally.resident_peak + self.system.resident_bytes,
            drive_ms=round(self._drive_s(tally.brought) / len(every) * 1e3, 3),
        )

    def _drive_s(self, rows: int) -> float:
        """Seconds that the simulator's SmartSSD needs: keys scanned by the card, rows, and streams.

        A command's latency is left out: it is a tenth of a millisecond.
        """
        card = Machine()
        row_bytes = rows * 2 * self.rig.workload.shape.head_dim * 2
        streamed = max(0, self.read_bytes - row_bytes)
        fetched = max(self.requests / card.drive_iops, row_bytes / card.drive_read)
        return self.evaluated_bytes / card.kernel_rate + fetched + streamed / card.drive_read


def measure(
    rig: Rig, streaming: Rig | None, budgets: Mapping[str, Budget], rounds: int, progress: Progress
) -> list[Row]:
    """Run each system of `budgets` with its budget, on `streaming` those that keep no keys in memory.

    They take turns, so that all see the same drift of the machine.
    Blocks. Raises InvalidInput when the workload has too few steps for `rounds`, and what the cache raises.
    """
    steps = len(rig.workload.queries)
    length = (steps - WARM_UP) // rounds
    if length < 1:
        raise InvalidInput(f"{rounds} rounds need {WARM_UP + rounds} recorded steps; there are {steps}")
    with ExitStack() as stack, progress("measuring", len(budgets) * (rounds + 1)) as advance:
        running = []
        for name, budget in budgets.items():
            of_rig = rig if SYSTEMS[name].keys_in_memory or streaming is None else streaming
            system = SYSTEMS[name](replace(of_rig, attends=budget))
            stack.callback(system.close)
            running.append(_Running(of_rig, system, budget))
            stack.callback(running[-1].cache.close)
        done = 0
        for number in range(rounds + 1):
            first = 0 if number == 0 else WARM_UP + (number - 1) * length
            for each in running:
                each.round(range(first, WARM_UP if number == 0 else first + length))
                if number == 0:
                    each.forget_warm_up()
                done += 1
                advance(done)
        return [each.row() for each in running]


def ratios(rows: Sequence[Row], of: str) -> dict[str, float]:
    """Return how many times faster `of` is than each other system, by medians."""
    mine = next((row.kvpath_ms for row in rows if row.system == of), None)
    return {} if mine is None else {r.system: round(r.kvpath_ms / mine, 2) for r in rows if r.system != of}
