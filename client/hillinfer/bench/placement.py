"""`hillinfer bench placement`: cold bytes read a step, by how DRAM is filled.

Recorded selections (`bench.selections`) are replayed against HKM's own slots
and hot pool, and against placing the M tokens of the highest last scores in
memory after each step (*top-M-by-last-score*, what the paper calls ping-pong
without its hit table). Both hold M rows of each layer and KV head in all, what
is attended included, and attend to the same tokens. A placed row that was not held is
read from the cold pool, be it attended or not. A third figure says how few reads are possible: those
of a policy that knows what will be selected (Belady 1966), and keeps whatever is needed soonest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hillinfer.bench.selections import Ids, Recording
from hillinfer.hkm.hot_pool import HotPool
from hillinfer.hkm.pools import Pools
from hillinfer.hkm.slots import Slots

SHARES = (0.025, 0.05, 0.1, 0.2)
"""M as shares of the context: about what a budget of 2 % needs, up to the paper's 20 %."""


@dataclass(frozen=True)
class Placement:
    """Rows read from the cold pool with M rows held, mean a step over layers and KV heads together.

    The first step, which finds memory empty, is left out of all three. ratio: hkm to top_m.
    """

    rows_held: int
    share: float
    top_m: float
    hkm: float
    clairvoyant: float
    ratio: float


def compare(recording: Recording, shares: Sequence[float] = SHARES) -> list[Placement]:
    """Replay a recording for each M. Seconds of work; no daemon."""
    results = []
    for share in shares:
        held = round(share * recording.context_tokens)
        if not max(recording.taken) <= held <= recording.depth:
            continue
        top_m, hkm, least = (
            float(np.mean(reads(recording, held)[1:]))
            for reads in (top_m_reads, hkm_reads, clairvoyant_reads)
        )
        results.append(Placement(held, share, top_m, hkm, least, hkm / top_m))
    return results


def top_m_reads(recording: Recording, held: int) -> npt.NDArray[np.int64]:
    """Rows read in each step when the `held` tokens of the highest scores are placed after it."""
    reads = np.zeros(recording.steps, np.int64)
    for orders in _heads(recording):
        before = np.zeros(max(recording.tokens), bool)
        for step, order in enumerate(orders):
            # What is attended is among them, and is read once.
            placed = np.zeros_like(before)
            placed[order[:held]] = True
            reads[step] += int((placed & ~before).sum())
            before = placed
    return reads


def hkm_reads(recording: Recording, held: int) -> npt.NDArray[np.int64]:
    """Rows read in each step by HKM's slots and hot pool."""
    reads = np.zeros(recording.steps, np.int64)
    for orders in _heads(recording):
        pools = Pools(Slots(1, 1, 1, 1, 1, torch.zeros(1)), HotPool(1, 1, 1, np.float32))
        for step, order in enumerate(orders):
            taken = recording.taken[step]
            pools.slots.resize(taken)
            pools.hot.resize(held - taken)
            pools.slots.lengths[0] = recording.tokens[step]
            missing = pools.admit(0, [np.sort(order[:taken])])
            pools.fill(0, missing.places, np.zeros((len(missing.ids), 2, 1), np.float32))
            pools.settle()
            reads[step] += len(missing.ids)
    return reads


def clairvoyant_reads(recording: Recording, held: int) -> npt.NDArray[np.int64]:
    """Rows read in each step by whoever knows all selections to come: the fewest possible."""
    reads = np.zeros(recording.steps, np.int64)
    never = recording.steps
    for orders in _heads(recording):
        selected = [order[: recording.taken[step]] for step, order in enumerate(orders)]
        following = np.full(max(recording.tokens), never)
        uses = []
        for step in reversed(range(recording.steps)):
            uses.append(following[selected[step]])
            following[selected[step]] = step
        held_now, next_use = np.zeros(len(following), bool), np.full(len(following), never)
        for step, ids in enumerate(selected):
            reads[step] += int((~held_now[ids]).sum())
            held_now[ids], next_use[ids] = True, uses[-1 - step]
            others = held_now.copy()
            others[ids] = False
            candidates = np.flatnonzero(others)
            excess = int(held_now.sum()) - held
            if excess > 0:
                held_now[candidates[np.argsort(-next_use[candidates], kind="stable")[:excess]]] = False
    return reads


def as_object(recording: Recording, budget: str, results: Sequence[Placement]) -> dict[str, Any]:
    """Return what `--json` prints; bytes are those of the rows."""
    selected = [taken * _streams(recording) for taken in recording.taken]
    return {
        "context_tokens": recording.context_tokens,
        "budget": budget,
        "questions": len(recording.first_steps),
        "steps": recording.steps,
        "row_bytes": recording.row_bytes,
        "selected_rows_per_step": float(np.mean(selected)),
        "placements": [
            {
                **asdict(each),
                "top_m_bytes_per_step": each.top_m * recording.row_bytes,
                "hkm_bytes_per_step": each.hkm * recording.row_bytes,
                "clairvoyant_bytes_per_step": each.clairvoyant * recording.row_bytes,
            }
            for each in results
        ],
    }


def as_markdown(told: dict[str, Any]) -> str:
    """Return the table of docs/placement.md from what `as_object` gives."""
    lines = [
        f"{told['context_tokens']:,} tokens, budget {told['budget']}, {told['questions']} questions in turn, "
        f"{told['steps']} steps; KiB of K and V read from the cold pool in each step, all layers:",
        "",
        "| rows held | of the context | top-M-by-last-score | HKM | of it | the least possible |",
        "|---|---|---|---|---|---|",
    ]
    for each in told["placements"]:
        lines.append(
            f"| {each['rows_held']:,} | {each['share']:.1%} | {each['top_m_bytes_per_step'] / 1024:,.0f} | "
            f"{each['hkm_bytes_per_step'] / 1024:,.0f} | **{each['ratio']:.3f}** | "
            f"{each['clairvoyant_bytes_per_step'] / 1024:,.0f} |"
        )
    return "\n".join(lines)


def _heads(recording: Recording) -> Iterator[list[Ids]]:
    """The orders of each layer and KV head, step by step."""
    for steps in recording.order.values():
        for head in range(len(steps[0])):
            yield [order[head] for order in steps]


def _streams(recording: Recording) -> int:
    return sum(len(steps[0]) for steps in recording.order.values())
