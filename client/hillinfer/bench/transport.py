"""`hillinfer bench transport`: what a round trip to the daemon costs, by gRPC and by the ring."""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from hillinfer.evaluation import EMPTY, EvaluateItem
from hillinfer.private_daemon import PrivateDaemon
from hillinfer.session import Session
from hillinfer_core.layout import DType, Precision, Shape

SHAPE = Shape(layers=1, kv_heads=8, head_dim=128, dtype=DType.float16, precision=Precision.int4)
"""Of one layer of an 8B model."""

_BATCH = 25  # calls of one transport before it is the other's turn


def bench_transport(calls: int, pool_dir: Path) -> dict[str, Any]:
    """Return p50 and p99, in us, of `calls` evaluations by each transport; they take turns. Blocks.

    The evaluation is the smallest that there is, 16 tokens and one winner, so that nearly all of its time is
    the way: client, daemon, worker, and back.
    """
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((8, 64, 128)).astype(np.float16)
    query = rng.standard_normal((32, 128)).astype(np.float32)
    held = np.full((8, 1), EMPTY, np.uint32)
    with ExitStack() as stack:
        pool = stack.enter_context(tempfile.TemporaryDirectory(prefix="hillinfer-transport-", dir=pool_dir))
        daemon = stack.enter_context(PrivateDaemon(pool_dir=Path(pool)))
        asked = {}
        for name, ring in (("grpc_stream", False), ("ring", True)):
            session = stack.enter_context(Session.connect(daemon.socket, name="bench transport", ring=ring))
            context = session.open_context(SHAPE)
            context.append(0, rows, rows)
            asked[name] = session, [EvaluateItem(context, query, 1, 0, 16, held)]
        times: dict[str, list[float]] = {name: [] for name in asked}
        for session, items in asked.values():
            session.evaluate_and_bring(0, items)
        for _ in range(0, calls, _BATCH):
            for name, (session, items) in asked.items():
                for _ in range(_BATCH):
                    started = time.perf_counter()
                    session.evaluate_and_bring(0, items)
                    times[name].append(time.perf_counter() - started)
    return {name: _figures(each) for name, each in times.items()}


def _figures(times: list[float]) -> dict[str, float]:
    micro = [each * 1e6 for each in times]
    return {"p50_us": round(statistics.median(micro)), "p99_us": round(float(np.quantile(micro, 0.99)))}
