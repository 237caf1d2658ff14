"""Who worked when in decode steps: spans for a trace, and their sums for the report."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import NamedTuple

MODEL, WORKER = "model", "worker"
"""Lanes: the thread that runs the model, whose time is the critical path, and what is done ahead of it."""

COMPUTE, PREDICT, WAIT, PLACE, APPEND = "compute", "predict", "wait", "place", "append"
EVALUATE = "evaluate+fetch"
LATE = "late fetch"
"""Ranking with the exact query on the critical path after a prefetch, and fetching what that missed."""

NAMES = (COMPUTE, PREDICT, EVALUATE, LATE, WAIT, PLACE, APPEND)


class Span(NamedTuple):
    """One piece of work. start, end: seconds of `perf_counter`; step: decode step of the layer."""

    lane: str
    name: str
    step: int
    layer: int
    start: float
    end: float


class Timeline:
    """Sums of all spans of one cache, and the spans themselves while `spans` is a list.

    Written by the thread of the model only.
    """

    def __init__(self) -> None:
        self.spans: list[Span] | None = None
        self.sums: dict[tuple[str, str], float] = {
            (lane, name): 0.0 for lane in (MODEL, WORKER) for name in NAMES
        }
        self.mark = 0.0
        """When the model's thread went on computing; 0 while it does not, or outside of a decode step."""

    def note(
        self, lane: str, name: str, step: int, layer: int, start: float, end: float | None = None
    ) -> float:
        """Record a span that began at `start` and ends now, or at `end`; returns its end."""
        end = perf_counter() if end is None else end
        self.sums[lane, name] += end - start
        if self.spans is not None:
            self.spans.append(Span(lane, name, step, layer, start, end))
        return end

    @property
    def hidden(self) -> float | None:
        """See `hidden_share`; of everything so far."""
        return hidden_share((lane, name, spent) for (lane, name), spent in self.sums.items())


def hidden_share(spent: Iterable[tuple[str, str, float]]) -> float | None:
    """Return 1 - (waiting on the critical path) / (evaluation and fetch), at least 0.

    spent: (lane, name, seconds) of any number of spans. Evaluation and fetch on the
    model's own lane are waited for in full. None when there was no evaluation.
    """
    work = waiting = 0.0
    for lane, name, seconds in spent:
        if name in (EVALUATE, LATE):
            work += seconds
        if lane == MODEL and name in (EVALUATE, LATE, WAIT):
            waiting += seconds
    return max(0.0, 1 - waiting / work) if work else None
