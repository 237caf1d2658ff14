"""Whether a split pays: rankings undivided and divided in turn, compared at the same rows."""

from __future__ import annotations

from itertools import combinations
from statistics import median
from typing import NamedTuple

SETTLING = 3
"""Rankings of each way with which a trial begins and that do not count: the boundary still moves, and the
mirrored keys come into the caches (seen: 2.9, 2.6, then 2.2 to 2.4 ms). Our choice."""

TURNS = 5
"""And those that count; two of them may be outliers. Our choice."""


class Taken(NamedTuple):
    """A whole ranking: seconds until its rows were there, and how many rows were missing."""

    seconds: float
    rows: int


class Trial:
    """Rankings of both ways, taken in turn, so that both see the same load. Not thread-safe."""

    def __init__(self) -> None:
        self.alone: list[Taken] = []
        self.together: list[Taken] = []

    @property
    def alone_is_next(self) -> bool:
        """Whether it is the turn of the drive alone."""
        return len(self.alone) <= len(self.together)

    @property
    def over(self) -> bool:
        """Whether both had their turns."""
        return min(len(self.alone), len(self.together)) >= SETTLING + TURNS

    def saved(self) -> float:
        """Return what dividing saves, as a share of what a ranking alone takes; negative where it costs."""
        alone, together = self.alone[SETTLING:], self.together[SETTLING:]
        return saved_s(alone, together) / median(each.seconds for each in alone)


def saved_s(alone: list[Taken], together: list[Taken]) -> float:
    """Return by how many seconds `together` is shorter, had all rankings missed as many rows.

    How many rows miss differs from ranking to ranking by far more than the two ways do. What a row takes
    is the median slope between two rankings of one way (Theil 1950, Sen 1968), never below 0.
    """
    slopes = [
        (b.seconds - a.seconds) / (b.rows - a.rows)
        for way in (alone, together)
        for a, b in combinations(way, 2)
        if a.rows != b.rows
    ]
    of_a_row = max(0.0, median(slopes)) if slopes else 0.0
    fixed = [median(each.seconds - of_a_row * each.rows for each in way) for way in (alone, together)]
    return fixed[0] - fixed[1]
