"""How the cost of a decode step grows: against the text's length, layers, batch and applications."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from hillinfer.bench.decode.growth_fits import exponents, lines
from hillinfer.bench.decode.subject import of_config
from hillinfer.bench.decode.systems import HillInfer, Setup
from hillinfer.pipeline.choice import Predictor
from hillinfer_core.layout import Precision

WARM_UP = 8
"""Steps that are not counted: slots and hot pool fill."""

HELD = 0.3
"""Share of the KV held besides evaluation keys; the least text needs it for its shared memory."""


@dataclass(frozen=True)
class Point:
    """One size of everything; of each axis one of them grows."""

    tokens: int = 8192
    layers: int = 4
    batch: int = 1
    applications: int = 1
    budget: str = "2%"

    def setup(self, pool_dir: Path | None, tokens: int) -> Setup:
        """Return the setup of one of its applications: a model whose arithmetic is next to nothing."""
        config = LlamaConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=self.layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, vocab_size=256, max_position_embeddings=1 << 20,
        )  # fmt: skip
        return Setup(
            of_config("small", config), "cpu", self.batch, self.budget, HELD, tokens, None,
            Predictor.exact.value, Precision.int4, pool_dir, None,
        )  # fmt: skip


AXES: dict[str, tuple[str, Sequence[int], Point]] = {
    "tokens": ("tokens", (4096, 8192, 16384, 32768, 65536), Point()),
    "tokens, 160 attended": ("tokens", (4096, 8192, 16384, 32768, 65536), Point(budget="160")),
    "layers": ("layers", (2, 4, 8, 16), Point()),
    "batch": ("batch", (1, 2, 4, 8), Point()),
    "applications": ("applications", (1, 2, 4), Point()),
}
"""What grows, to what, while all else is as in the point."""


def measure(
    axis: str,
    pool_dir: Path | None,
    rounds: int,
    steps: int,
    say: Callable[[str], None],
    sizes: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the costs of a step at each size of an axis, medians of rounds in turn, and what fits them.

    sizes: others than those of `AXES`. Several applications decode at once, each a session with a context of
    its own on the same daemon. Blocks. Raises what `attach` raises.
    """
    name, usual, point = AXES[axis]
    sizes = sorted(sizes or usual)
    longest = WARM_UP + rounds * steps + 1
    with ExitStack() as stack, torch.inference_mode():
        running = []
        for size in sizes:
            at = replace(point, **{name: size})  # type: ignore[arg-type]  # by name
            running.append(_Running(at, at.setup(pool_dir, at.tokens + longest), stack))
            say(f"{axis}: {size:,} ready")
        for each in running:
            each.decode(WARM_UP)
        for number in range(rounds):
            for each in running:
                each.round(steps)
            say(f"{axis}: round {number + 1} of {rounds}")
        points = [{"size": size} | each.costs(steps) for size, each in zip(sizes, running, strict=True)]
    fitted = {"exponents": exponents(points), "lines": lines(points)}
    return {"axis": axis, "budget": point.budget, "points": points} | fitted


class _Running:
    """The applications of a point, each with a thread of its own where there are several."""

    def __init__(self, point: Point, setup: Setup, stack: ExitStack) -> None:
        self._systems: list[HillInfer] = []
        for _ in range(point.applications):
            first = self._systems[0] if self._systems else None
            model = setup.subject.load(torch.float32, "cpu")
            system = HillInfer(setup, model, copies=point.applications, beside=first)
            stack.callback(system.close)
            system.fill(point.tokens)
            self._systems.append(system)
        self._tokens = [torch.zeros((point.batch, 1), dtype=torch.long) for _ in self._systems]
        self._rounds: list[dict[str, float]] = []

    def decode(self, steps: int) -> list[float]:
        """Take steps in all applications at once; return the seconds of each step."""
        times: list[float] = []

        def work(number: int) -> None:
            with torch.inference_mode():  # of each thread
                for _ in range(steps):
                    began = time.perf_counter()
                    self._tokens[number] = self._systems[number].feed(self._tokens[number])
                    times.append(time.perf_counter() - began)

        with ThreadPoolExecutor(len(self._systems)) as threads:
            list(threads.map(work, range(len(self._systems))))
        return times

    def round(self, steps: int) -> None:
        """Take steps and note what they cost."""
        before = [each.spent() for each in self._systems]
        times = self.decode(steps)
        after = [each.spent() for each in self._systems]
        names = ("evaluated_bytes", "read_bytes", "brought")
        found = {
            name: sum(late[name] - early[name] for early, late in zip(before, after, strict=True))
            for name in names
        }
        # One process stands for the drive of all.
        found["drive_cpu_s"] = after[0]["drive_cpu_s"] - before[0]["drive_cpu_s"]
        self._rounds.append(found | {"step_s": statistics.median(times)})

    def costs(self, steps: int) -> dict[str, Any]:
        """Return the costs of a step, of all applications together but for its time."""

        def of(name: str) -> float:
            return statistics.median(each[name] for each in self._rounds)

        times = [each["step_s"] * 1e3 for each in self._rounds]
        cpu = sum(each["drive_cpu_s"] for each in self._rounds) / (len(self._rounds) * steps)
        return {
            "step_ms": round(statistics.median(times), 3),
            "least_ms": round(min(times), 3),
            "greatest_ms": round(max(times), 3),
            "evaluated_bytes": round(of("evaluated_bytes") / steps),
            "read_bytes": round(of("read_bytes") / steps),
            "row_reads": round(of("brought") / steps, 1),
            "drive_cpu_ms": round(cpu * 1e3, 3),
        }
