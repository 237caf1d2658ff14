"""Makes a layer's compute last as long as the simulator says that a GPU takes for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from hillinfer.simulate.machine import machine_with
from hillinfer.simulate.systems import Layer, compute
from hillinfer.simulate.workload import Model, Work
from hillinfer_core.errors import InvalidInput
from hillinfer_core.wait import wait_until


@dataclass(frozen=True)
class Gpu:
    """A GPU by name and what `batch` sequences of `model` cost on it. Times in seconds, of one layer."""

    name: str
    model: Model
    batch: int

    def check_room(self, kv_tokens: int) -> None:
        """Raise InvalidInput unless its memory has room for the weights and the KV of so many tokens."""
        machine, model = machine_with(self.name), self.model
        room = machine.gpu_memory - machine.gpu_reserve
        needed = 2 * model.parameters + kv_tokens * self._token_bytes * model.layers
        if needed > room:
            raise InvalidInput(
                f"{self.name} has room for {room / 1e9:.1f} GB of weights and KV, and {model.name} with "
                f"{kv_tokens:,} tokens in its memory needs {needed / 1e9:.1f}: take a smaller batch or "
                "model, or leave out default"
            )

    @property
    def query_s(self) -> float:
        """Of a query alone: its part of what makes query, key and value."""
        model = self.model
        return self.layer(0).project * model.heads / (model.heads + 2 * model.kv_heads)

    def layer(self, attended: int) -> Layer:
        """Return a layer's times with so many tokens attended by each KV head."""
        return _layer(self, attended)

    def offloaded_s(self, tokens: int) -> float:
        """Return how long all KV of a layer takes from the host's memory to the GPU."""
        return tokens * self._token_bytes / machine_with(self.name).gpu_link

    @property
    def _token_bytes(self) -> int:
        return self._work.row_bytes * self._work.streams

    @property
    def _work(self) -> Work:
        return Work(self.model, self.batch, 0, 0.0, 0.0)


@lru_cache(maxsize=4096)
def _layer(gpu: Gpu, attended: int) -> Layer:
    return compute(gpu._work, machine_with(gpu.name), attended * gpu._token_bytes)


class Pace:
    """Waits in the stead of a GPU, for one model; not thread-safe. now, sleep: the clock, in seconds.

    A layer's compute is in two stretches: up to its query, key and value, and from its attention on. What the
    first took too long the second may make up, as a GPU's queue does. A layer whose own work
    took longer than its time is late, and is counted.
    """

    def __init__(
        self,
        gpu: Gpu,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.gpu = gpu
        self.layers = self.late = 0
        """Layers computed so far, and how many of them were late."""
        self.wanted_s = self.took_s = 0.0
        """Of all of them, queries computed ahead included: what the GPU would take, and what it took here."""
        self._now, self._sleep = now, sleep
        self._began = self._spent = 0.0

    def begin(self) -> None:
        """A layer, or a query ahead of its layer, begins to compute."""
        self._began = self._now()

    def predicted(self) -> None:
        """A query that was computed ahead is there: wait for it."""
        wanted = self.gpu.query_s
        self.wanted_s += wanted
        self.took_s += self._wait(self._began, wanted)

    def projected(self) -> None:
        """A layer's own query, key and value are there: wait for them."""
        self._spent = self._wait(self._began, self.gpu.layer(0).project)

    def attended(self, began: float, tokens: int, link_s: float = 0.0) -> None:
        """A layer is done, whose attention `began` with its KV on the GPU: wait for it.

        tokens: attended by each KV head. link_s: what must cross to the GPU meanwhile.
        """
        of_gpu = self.gpu.layer(tokens)
        wanted = max(of_gpu.project + of_gpu.attend, link_s)
        self.layers += 1
        self.late += self._spent + self._now() - began > wanted
        self.wanted_s += wanted
        self.took_s += self._spent + self._wait(began, wanted - self._spent)

    def now(self) -> float:
        """Return the time."""
        return self._now()

    def _wait(self, began: float, seconds: float) -> float:
        wait_until(began + seconds, self._now, self._sleep)
        return self._now() - began
