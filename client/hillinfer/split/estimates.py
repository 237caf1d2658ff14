"""Running estimates of how fast a side works: nothing is profiled in advance."""

from __future__ import annotations

from collections import deque
from statistics import median

LATEST = 7
"""Observations of which a median is taken. Our choice: three outliers move nothing, and a lasting change
counts after four, well within the 20 steps in which a boundary is to have followed."""


class Latest:
    """The median of the last `LATEST` figures. Not thread-safe."""

    def __init__(self) -> None:
        self._figures: deque[float] = deque(maxlen=LATEST)

    def add(self, figure: float) -> None:
        """Count a figure."""
        self._figures.append(figure)

    @property
    def known(self) -> bool:
        """Whether there was any."""
        return bool(self._figures)

    @property
    def median(self) -> float:
        """Return it, 0 before any figure."""
        return median(self._figures) if self._figures else 0.0


class Estimate:
    """Time of a side as a line: T = overhead + bytes of evaluation keys / rate. Not thread-safe.

    A side says how long its scan took of the time waited for it. The rate is of the scan alone; the rest (the
    way there and back, waiting in a queue, a thread that starts) is overhead. A line fitted to the time
    waited alone would take the noise of one for a change of the other: nothing tells them apart while the
    boundary stands still.
    """

    def __init__(self) -> None:
        self.observations = 0
        self._s_per_byte, self._overhead_s = Latest(), Latest()

    @property
    def known(self) -> bool:
        """Whether anything was observed."""
        return self.observations > 0

    @property
    def s_per_byte(self) -> float:
        """Seconds of scan for a byte, 0 before any observation."""
        return self._s_per_byte.median

    @property
    def overhead_s(self) -> float:
        """Seconds beside the scan, 0 before any observation."""
        return self._overhead_s.median

    def seconds(self, nbytes: float) -> float:
        """Return the time expected for ``nbytes``; 0 of them take none."""
        return self.overhead_s + nbytes * self.s_per_byte if nbytes > 0 else 0.0

    def observe(self, nbytes: float, waited_s: float, scan_s: float) -> None:
        """Learn that ``nbytes`` took ``waited_s``, ``scan_s`` of it for the scan; 0: not said."""
        if nbytes <= 0 or waited_s <= 0:
            return
        self.observations += 1
        scan_s = min(scan_s or waited_s, waited_s)
        self._s_per_byte.add(scan_s / nbytes)
        self._overhead_s.add(waited_s - scan_s)
