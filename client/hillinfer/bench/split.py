"""`hillinfer bench split`: whether CPU and drive finish together, what that is worth, and after a change.

For a drive that becomes slower there is a second daemon with the same rows, paced to a third; from that step
on it is asked. The CPU becomes slower by scanning everything three times. A step is a ranking of each layer.
The boundary is made to follow the two sides even where a split saves nothing.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hillinfer.bench.split_rig import Rig, Setup, Step, on_cores
from hillinfer.hkm.policy import ColdPoolRanking, SelectionPolicy
from hillinfer.progress import Progress, silent
from hillinfer.split.ranking import SplitRanking
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import DType, Precision, Shape

BALANCED = 0.15
"""Imbalance, of the larger time, that the project asks for."""

RECOVER_STEPS = 20
"""Steps after a change within which it asks for that again."""

SETTLING_STEPS = 20
"""Steps at the beginning, and after a change, that count as no steady state."""

SLOWED = 3


def setups(tokens: int, layers: int) -> list[Setup]:
    """Return what is measured: layers as of an 8B model, and of the bundled one."""

    def large(precision: Precision) -> Shape:
        return Shape(layers, 8, 128, DType.float16, precision)

    return [
        Setup("8B, INT8", large(Precision.int8), 32, tokens),
        Setup("8B, INT4", large(Precision.int4), 32, tokens),
        Setup("8B, INT8, keys streamed", large(Precision.int8), 32, tokens, streamed=True),
        Setup("bundled, INT4", Shape(8, 2, 64, DType.float16, Precision.int4), 8, tokens),
    ]


def measure(
    setup: Setup,
    pool_dir: Path,
    profile: str,
    rounds: int,
    steps: int,
    slow: Sequence[tuple[str, int]] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure one setup; returns its part of what `--json` prints. Blocks.

    rounds: of drive alone, CPU alone and both, in turn. steps: of each run of the split; slow: a run for
    each, "cpu" or "drive" and the step from which on it is a third as fast.
    """
    with ExitStack() as stack:
        cores = sorted(os.sched_getaffinity(0))
        ours, theirs = set(cores[: len(cores) // 2] or cores), set(cores[len(cores) // 2 :])
        stack.enter_context(on_cores(ours))
        fast = Rig(stack, setup, pool_dir, profile, theirs)
        slower = fast
        if any(side == "drive" for side, _ in slow):
            slower = Rig(stack, setup, pool_dir, f"{profile}_third", theirs)
        changes: list[tuple[str, int] | None] = [*slow] or [None]
        with progress(setup.name, 3 * rounds + steps * len(changes)) as advance:
            compared = compare(fast, rounds)
            advance(3 * rounds)
            runs = []
            for number, change in enumerate(changes):
                runs.append(follow(fast, slower, steps, change))
                advance(3 * rounds + steps * (number + 1))
    return {
        "name": setup.name,
        "tokens": setup.tokens,
        "layers": setup.shape.layers,
        "kv_heads": setup.shape.kv_heads,
        "head_dim": setup.shape.head_dim,
        "keys": setup.shape.precision.value,
        "evaluation_ms": compared,
        "runs": runs,
    }


def parse_slow(text: str, steps: int) -> tuple[str, int]:
    """Read "cpu@40" or "drive@40"; raises InvalidInput, also for a step that leaves nothing to see."""
    side, _, at = text.partition("@")
    least, most = SETTLING_STEPS + 3, steps - RECOVER_STEPS - 3
    if side not in ("cpu", "drive") or not at.isdecimal() or not least <= int(at) <= most:
        raise InvalidInput(
            f"--slow is cpu@STEP or drive@STEP, with a step of {least} to {most}, not {text!r}"
        )
    return side, int(at)


def as_markdown(found: Sequence[dict[str, Any]]) -> str:
    """Return the tables of docs/split.md from what `measure` returned."""
    lines = [
        "| layer | drive alone | CPU alone | both | the CPU's tokens | T_cpu and T_drive differ by |",
        "|---|---|---|---|---|---|",
    ]
    changes = [
        "",
        "| layer | slowed | differ by, in the step after it | 20 steps later | balanced again after |",
        "|---|---|---|---|---|",
    ]
    for each in found:
        ms = each["evaluation_ms"]
        first = each["runs"][0]
        last = first["steps"][(first["at_step"] or len(first["steps"])) - 1]
        lines.append(
            f"| {each['name']} | {ms['drive']:.2f} ms | {ms['cpu']:.2f} ms | {ms['split']:.2f} ms | "
            f"{last['cpu_tokens'] / each['tokens']:.0%}, {last['stop']} | {_told(first['steady'])} |"
        )
        for run in each["runs"]:
            if run["slowed"]:
                at = run["steps"][run["at_step"]]["imbalance"]
                changes.append(
                    f"| {each['name']} | {run['slowed']} | {'at its end' if at is None else f'{at:.0%}'} | "
                    f"{_told(run['after'])} | {_recovery(run['recovered_after_steps'])} |"
                )
    return "\n".join(lines + (changes if len(changes) > 3 else []))


def _recovery(steps: int | None) -> str:
    return "not in the run" if steps is None else f"{steps} steps" if steps != 1 else "1 step"


def _told(state: dict[str, Any]) -> str:
    if state["imbalance"] is None:
        return "at its end"
    return f"{state['imbalance']:.0%} (within 15 % in {state['balanced_share']:.0%} of steps)"


def compare(rig: Rig, rounds: int) -> dict[str, float]:
    """Return medians of milliseconds for a layer, rows included: of the drive, the CPU, and both."""
    split, cpu = SplitRanking(least_gain=-1.0), SplitRanking(1.0)
    policies: dict[str, SelectionPolicy] = {"drive": ColdPoolRanking(), "cpu": cpu, "split": split}
    times: dict[str, list[float]] = {name: [] for name in policies}
    try:
        for number in range(rounds + SETTLING_STEPS):
            query = rig.query()
            for name, policy in policies.items():
                step = rig.step(policy, query)
                if number >= SETTLING_STEPS:
                    times[name].append(step.wall_ms / rig.setup.shape.layers)
    finally:
        split.close()
        cpu.close()
    return {name: round(statistics.median(each), 3) for name, each in times.items()}


def follow(fast: Rig, slower: Rig, steps: int, change: tuple[str, int] | None) -> dict[str, Any]:
    """Run the split alone for some steps, with a change in one of them, and say how it kept its balance."""
    side, at = change or ("", steps)
    policy = SplitRanking(least_gain=-1.0)
    taken: list[Step] = []
    try:
        for number in range(steps):
            if number >= at and side == "cpu":
                policy.cpu_repeats = SLOWED
            rig = slower if number >= at and side == "drive" else fast
            taken.append(rig.step(policy, rig.query()))
    finally:
        policy.close()
    steady, after = taken[SETTLING_STEPS:at], taken[at + RECOVER_STEPS :]
    return {
        "slowed": side or None,
        "at_step": at if side else None,
        "steady": _state(steady),
        "after": _state(after) if side else None,
        "recovered_after_steps": _recovered(taken[at:]) if side else None,
        "steps": [asdict(step) for step in taken],
    }


def _state(steps: Sequence[Step]) -> dict[str, float | None]:
    """Return the median imbalance, and the share of steps within `BALANCED`, of those not at an end.

    Both None where most were at an end, which they say.
    """
    found = [step.imbalance for step in steps if step.imbalance is not None]
    if 2 * len(found) < len(steps):
        return {"imbalance": None, "balanced_share": None}
    within = sum(each <= BALANCED for each in found) / len(found)
    return {"imbalance": round(statistics.median(found), 3), "balanced_share": round(within, 3)}


def _recovered(steps: Sequence[Step]) -> int | None:
    """Return after how many steps three in a row are within `BALANCED`, or at an end, which they say."""
    within = [step.imbalance is None or step.imbalance <= BALANCED for step in steps]
    return next((at for at in range(len(within) - 2) if all(within[at : at + 3])), None)
