"""One cell: a context length and a batch, all systems in turn, round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hillinfer.bench.decode.subject import twin
from hillinfer.bench.decode.systems import (
    ATTENDED,
    HILLINFER,
    HillInfer,
    Setup,
    System,
    plain,
)
from hillinfer.pipeline.trace import write_trace
from hillinfer_core.errors import InvalidInput

WARM_UP, PLAIN_WARM_UP = 8, 2
"""Decode steps that are not counted: of HillInfer slots and hot pool fill, and `auto` makes up its mind."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    systems: (name, dtype) in the order of their turns. context_tokens: read before anything is asked.
    readings: times that the text is read by each; 0 to have made-up KV instead. rounds: each a question,
    if the text was read, and `steps` decode steps. time_limit_s: after which nothing new is begun.
    """

    systems: Sequence[tuple[str, torch.dtype]]
    context_tokens: int
    readings: int
    rounds: int
    steps: int
    time_limit_s: float

    def tokens(self, question_tokens: int) -> int:
        """Tokens of a sequence at the end."""
        return self.context_tokens + WARM_UP + self.rounds * (question_tokens + self.steps)


@dataclass
class Measured:
    """What one system did. Times in seconds; rounds: of decode steps; spent: in all of these together."""

    system: System
    token: torch.Tensor
    readings: list[float] = field(default_factory=list)
    questions: list[float] = field(default_factory=list)
    rounds: list[list[float]] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)

    def decode(self, steps: int, *, counted: bool = True) -> None:
        """Take decode steps."""
        before, times = self.system.spent(), []
        for _ in range(steps):
            began = time.perf_counter()
            self.token = self.system.feed(self.token)
            times.append(time.perf_counter() - began)
        if counted:
            self.rounds.append(times)
            for name, total in self.system.spent().items():
                self.spent[name] = self.spent.get(name, 0.0) + total - before[name]


def measure_cell(setup: Setup, plan: Plan, say: Say, told: Callable[[list[dict[str, Any]]], None]) -> None:
    """Measure and hand the rows so far to `told` after every round. Blocks.

    Raises InvalidInput where the device has no room, and what `attach` raises.
    """
    ends = time.monotonic() + plan.time_limit_s
    # cuDNN's attention plans anew for every length, 40 ms a step of a growing cache on an H200: unfair to it.
    torch.backends.cuda.enable_cudnn_sdp(False)
    text = setup.subject.text(plan.context_tokens).repeat(setup.batch, 1)
    questions = [each.repeat(setup.batch, 1) for each in setup.subject.questions]
    with ExitStack() as stack, torch.inference_mode():
        try:
            running = [Measured(system, text[:, -1:]) for system in _open(setup, plan, stack, say)]
            for number in range(max(1, plan.readings)):
                for each in running:
                    if number == 0 or time.monotonic() < ends:
                        _begin(each, text, plan, say)
            attended = _attended(setup, running, stack)
            running += attended
            for each in running:
                each.decode(WARM_UP if isinstance(each.system, HillInfer) else PLAIN_WARM_UP, counted=False)
            for number in range(plan.rounds):
                for each in running:
                    if plan.readings and each not in attended:
                        began = time.perf_counter()
                        each.token = each.system.feed(questions[number % len(questions)])
                        each.questions.append(time.perf_counter() - began)
                    each.decode(plan.steps)
                say(
                    f"round {number + 1}: "
                    + ", ".join(
                        f"{each.system.name} {statistics.median(each.rounds[-1]) * 1e3:.1f} ms"
                        for each in running
                    )
                )
                told([row(each, setup, plan) for each in running])
                _write_trace(setup, running)
                if time.monotonic() > ends:
                    say(f"the time limit of {plan.time_limit_s:g} s is reached")
                    break
        except torch.OutOfMemoryError:
            raise InvalidInput(
                f"{setup.device} has too little memory for this: fewer systems, tokens or a smaller batch"
            ) from None


def _open(setup: Setup, plan: Plan, stack: ExitStack, say: Say) -> list[System]:
    models: dict[torch.dtype, Any] = {}
    systems: list[System] = []
    for name, dtype in plan.systems:
        began = time.monotonic()
        if dtype not in models:
            models[dtype] = setup.subject.load(dtype, setup.device)
        model = twin(models[dtype])  # attention and hooks are each one's own
        system: System = HillInfer(setup, model) if name == HILLINFER else plain(setup, name, model)
        stack.callback(system.close)
        systems.append(system)
        say(f"{name}, {_short(dtype)}: ready after {time.monotonic() - began:.1f} s")
    return systems


def _write_trace(setup: Setup, running: Sequence[Measured]) -> None:
    for each in running:
        if setup.trace is not None and isinstance(each.system, HillInfer):
            write_trace(setup.trace, each.system.spans)


def _begin(each: Measured, text: torch.Tensor, plan: Plan, say: Say) -> None:
    each.system.begin()
    began = time.perf_counter()
    if plan.readings:
        each.token = each.system.read(text)
        each.readings.append(time.perf_counter() - began)
    else:
        each.system.fill(plan.context_tokens)
    what = "read" if plan.readings else "filled with made-up KV"
    say(f"{each.system.name}, {_short(each.system.dtype)}: {what} in {time.perf_counter() - began:.1f} s")


def _attended(setup: Setup, running: Sequence[Measured], stack: ExitStack) -> list[Measured]:
    """Return the model with HillInfer's attended tokens and no others in a plain cache: arithmetic alone."""
    for each in running:
        if isinstance(each.system, HillInfer):
            system = each.system
            each.decode(1, counted=False)
            bare = plain(setup, ATTENDED, system.bare)
            bare.begin()
            bare.fill(system.attended)
            stack.callback(bare.close)
            return [Measured(bare, each.token)]
    return []


def row(each: Measured, setup: Setup, plan: Plan) -> dict[str, Any]:
    """Return what `--json` has of one system; times are medians, with the least and the greatest round."""
    system, every = each.system, [step for steps in each.rounds for step in steps]
    steps = len(every)
    rates = [setup.batch * len(times) / sum(times) for times in each.rounds]
    held = system.held()
    full = setup.full_bytes(system.dtype)
    keys = held.get("evaluation_keys", 0)
    return {
        "system": system.name,
        "dtype": _short(system.dtype),
        "model": setup.subject.name,
        "device": setup.device,
        "context_tokens": plan.context_tokens,
        "kv": "read" if plan.readings else "made up" if setup.replay is None else "recorded",
        "batch": setup.batch,
        "budget": setup.budget if system.name in (HILLINFER, ATTENDED) else None,
        "profile": setup.profile,
        "rounds": len(each.rounds),
        "steps": steps,
        "tokens_per_s": _spread(rates),
        "step_p50_ms": _ms(statistics.median(every)),
        "step_p99_ms": _ms(float(np.quantile(every, 0.99))),
        "prefill_s": _spread(each.readings),
        "question_s": _spread(each.questions),
        "full_bytes": full,
        "resident_bytes": sum(held.values()),
        "resident_without_keys_bytes": sum(held.values()) - keys,
        "resident": held,
        "pace": _pace(each, steps),
        **_per_token(each, steps),
    }


def _pace(each: Measured, steps: int) -> dict[str, float] | None:
    """Compute of a step as the GPU's time has it and as it was; the share of layers that took longer."""
    spent = each.spent
    if "pace_layers" not in spent:
        return None
    return {
        "wanted_ms": _ms(spent["pace_wanted_s"] / steps),
        "took_ms": _ms(spent["pace_took_s"] / steps),
        "late_share": round(spent["pace_late"] / spent["pace_layers"], 4),
    }


def _per_token(each: Measured, steps: int) -> dict[str, Any]:
    spent = {name: total for name, total in each.spent.items() if not name.startswith("pace_")}
    selected, brought = spent.pop("selected", 0), spent.pop("brought", 0)
    told: dict[str, Any] = {"miss_rate": round(brought / selected, 4) if selected else None}
    if isinstance(each.system, HillInfer):
        told["attended_tokens"] = each.system.attended
        told["hidden_share"] = each.system.hidden
    cpu, parts = {}, {}
    for name, total in spent.items():
        if name.endswith("_bytes"):
            told[f"{name}_per_step"] = round(total / steps)
        elif name.endswith("_cpu_s"):
            cpu[name.removesuffix("_cpu_s")] = _ms(total / steps)
        else:
            parts[name.removesuffix("_s")] = _ms(total / steps)
    return told | {"cpu_ms_per_step": cpu, "parts_ms": parts}


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "greatest": round(max(values), 4),
        "of": len(values),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
