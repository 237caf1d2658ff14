"""`hillinfer bench transport`: what a round trip to the daemon costs, by gRPC and by the ring."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from hillinfer.evaluation import EMPTY, EvaluateItem
from hillinfer.private_daemon import PrivateDaemon
from hillinfer.session import Session
from hillinfer_core.layout import DType, Precision, Shape

SHAPE = Shape(layers=1, kv_heads=8, head_dim=128, dtype=DType.float16, precision=Precision.int4)
"""Of one layer of an 8B model."""

TRANSPORTS = {"grpc_stream": False, "ring": True}

_BATCH = 25  # calls of one transport before it is the other's turn
_PATIENCE_S = 60.0  # longest that clients wait for one another


def bench_transport(calls: int, pool_dir: Path, clients: int, seconds: float) -> dict[str, Any]:
    """Return figures of `calls` evaluations by each transport, which take turns. Blocks.

    p50 and p99 are of a round trip, `above_p50` and `above_p99` of a round trip less the time that ranking
    took in the worker, all in us. With `clients` there is `per_s` too: the evaluations a second
    of as many processes together, each asking one after another for `seconds` seconds. The evaluation is
    the smallest that there is, 16 tokens and one winner, so that nearly all of its time is the way: client,
    daemon, worker, and back.
    """
    with ExitStack() as stack:
        pool = stack.enter_context(tempfile.TemporaryDirectory(prefix="hillinfer-transport-", dir=pool_dir))
        daemon = stack.enter_context(PrivateDaemon(pool_dir=Path(pool)))
        asked = {name: stack.enter_context(_Asking(daemon.socket, ring)) for name, ring in TRANSPORTS.items()}
        for _ in range(0, calls, _BATCH):
            for each in asked.values():
                for _ in range(_BATCH):
                    each.ask()
        told = {name: each.figures() for name, each in asked.items()}
        if clients:
            for name, ring in TRANSPORTS.items():
                told[name]["per_s"] = round(_together(daemon.socket, ring, clients, seconds))
    return told


class _Asking:
    """A session that asks the same again and again; `times` are pairs of seconds: in all, and of ranking."""

    def __init__(self, socket: Path, ring: bool) -> None:
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((8, 64, 128)).astype(np.float16)
        query = rng.standard_normal((32, 128)).astype(np.float32)
        self._session = Session.connect(socket, name="bench transport", ring=ring)
        context = self._session.open_context(SHAPE)
        context.append(0, rows, rows)
        self._items = [EvaluateItem(context, query, 1, 0, 16, np.full((8, 1), EMPTY, np.uint32))]
        self.times: list[tuple[float, float]] = []
        self.ask()
        self.times.clear()

    def ask(self) -> None:
        started = time.perf_counter()
        (brought,) = self._session.evaluate_and_bring(0, self._items)
        self.times.append((time.perf_counter() - started, brought.scan_s))

    def figures(self) -> dict[str, float]:
        whole, above = [taken for taken, _ in self.times], [taken - scan for taken, scan in self.times]
        return {**_quantiles("", whole), **_quantiles("above_", above)}

    def __enter__(self) -> _Asking:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()


def _quantiles(name: str, times: list[float]) -> dict[str, float]:
    micro = [each * 1e6 for each in times]
    return {
        f"{name}p50_us": round(statistics.median(micro)),
        f"{name}p99_us": round(float(np.quantile(micro, 0.99))),
    }


def _together(socket: Path, ring: bool, clients: int, seconds: float) -> float:
    """Return how many evaluations a second `clients` processes have together."""
    context = multiprocessing.get_context("spawn")
    ready, told = context.Barrier(clients), context.SimpleQueue()
    processes = [
        context.Process(target=_client, args=(socket, ring, seconds, ready, told)) for _ in range(clients)
    ]
    for process in processes:
        process.start()
    rates = 0.0
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a client of the benchmark ended with code {process.exitcode}")
        rates += told.get()
    return rates


def _client(socket: Path, ring: bool, seconds: float, ready: Barrier, told: SimpleQueue[float]) -> None:
    with _Asking(socket, ring) as asking:
        ready.wait(_PATIENCE_S)
        started = time.perf_counter()
        while (taken := time.perf_counter() - started) < seconds:
            asking.ask()
        told.put(len(asking.times) / taken)
