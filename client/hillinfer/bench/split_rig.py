"""What `hillinfer bench split` asks: a paced daemon on some of the cores, with a context to rank.

The daemon's processes have half of the cores and the client the other half: a real drive takes none of the
CPU's. Keys are random, queries drift, and the rows of most winners are held, as in decoding.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hillinfer.context import Context
from hillinfer.evaluation import EvaluateItem
from hillinfer.hkm.policy import SelectionPolicy
from hillinfer.private_daemon import PrivateDaemon
from hillinfer.session import Session
from hillinfer.split.boundary import Stop
from hillinfer.split.controller import Times
from hillinfer.split.ranking import SplitRanking
from hillinfer_core.layout import Shape

_BUDGET = 50  # one token in so many wins, 2 %
_APPEND = 4096  # tokens at a time, as many as the largest extent has
_DRIFT = 0.05  # of a query against the first one: about nineteen in twenty winners stay the same
_STREAMED_DRAM = 4 << 20  # too small for the keys: the drive reads nearly all of them for each scan


@dataclass(frozen=True)
class Setup:
    """A layer's shape, how many layers, and where the drive has the evaluation keys.

    streamed: from its NAND, as where contexts exceed the card's memory; else in that memory.
    """

    name: str
    shape: Shape
    query_heads: int
    tokens: int
    streamed: bool = False


@dataclass(frozen=True)
class Step:
    """All layers of a step: sums of T_cpu and T_drive in milliseconds, None while the drive ranks alone.

    imbalance: |T_cpu - T_drive| of the larger, of the layers whose boundary is not at an end, None if all
    are. cpu_tokens: mean over the layers. stop: why most boundaries are where they are.
    """

    cpu_ms: float | None
    drive_ms: float | None
    imbalance: float | None
    wall_ms: float
    cpu_tokens: int
    stop: str


class Rig:
    """A daemon on the cores ``theirs``, paced to ``profile``, with the setup's context; ends with it."""

    def __init__(
        self, stack: ExitStack, setup: Setup, pool_dir: Path, profile: str, theirs: set[int]
    ) -> None:
        self.setup = setup
        shape, rng = setup.shape, np.random.default_rng(0)
        rows_bytes = shape.layers * shape.kv_heads * setup.tokens * shape.row_bytes
        with on_cores(theirs):
            daemon = stack.enter_context(
                PrivateDaemon(
                    pool_capacity=2 * rows_bytes + (64 << 20),
                    pool_dir=pool_dir,
                    profile=profile,
                    evaluation_keys_dram=_STREAMED_DRAM if setup.streamed else None,
                )
            )
        self.session = stack.enter_context(Session.connect(daemon.socket, name="bench split"))
        self.context: Context = self.session.open_context(shape)
        for layer in range(shape.layers):
            for first in range(0, setup.tokens, _APPEND):
                size = (shape.kv_heads, min(_APPEND, setup.tokens - first), shape.head_dim)
                rows = rng.standard_normal(size, np.float32).astype(np.float16)
                self.context.append(layer, rows, rows)
        self._rng = rng
        self._base = rng.standard_normal((setup.query_heads, shape.head_dim), np.float32)
        nothing = np.empty((shape.kv_heads, 0), np.uint32)
        self._held = [
            self.session.rank(layer, [self._item(self._base, nothing)])[0].ids
            for layer in range(shape.layers)
        ]

    def query(self) -> npt.NDArray[np.float32]:
        """Return the query of another step."""
        drift = self._rng.standard_normal(self._base.shape, np.float32)
        moved: npt.NDArray[np.float32] = self._base + np.float32(_DRIFT) * drift
        return moved

    def step(self, policy: SelectionPolicy, query: npt.NDArray[np.float32]) -> Step:
        """Rank every layer."""
        split = policy if isinstance(policy, SplitRanking) else None
        found: list[tuple[Times, Stop]] = []
        began = time.perf_counter()
        for layer, held in enumerate(self._held):
            policy.select(self.session, layer, [self._item(query, held)])
            if split is not None and split.latest is not None:
                found.append((split.latest, split.controllers[layer].boundary.stop))
        wall_ms = round((time.perf_counter() - began) * 1e3, 3)
        if split is None or not found:
            return Step(None, None, None, wall_ms, 0, "")
        free = [times for times, stop in found if stop in (Stop.none, Stop.block)]
        cpu, drive = sum(each.cpu_s for each in free), sum(each.drive_s for each in free)
        return Step(
            round(sum(times.cpu_s for times, _ in found) * 1e3, 3),
            round(sum(times.drive_s for times, _ in found) * 1e3, 3),
            round(abs(cpu - drive) / max(cpu, drive), 3) if free else None,
            wall_ms,
            round(statistics.mean(each.boundary.cpu_tokens for each in split.controllers.values())),
            statistics.mode(stop.value for _, stop in found),
        )

    def _item(self, query: npt.NDArray[np.float32], held: npt.NDArray[np.uint32]) -> EvaluateItem:
        tokens = self.setup.tokens
        return EvaluateItem(self.context, query, tokens // _BUDGET, 0, tokens, held)


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Have this thread, and what it starts, on these cores; the kernel takes as many threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
