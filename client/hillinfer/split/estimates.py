"""Running estimates of how fast a side works: nothing is profiled in advance."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

WEIGHT = 0.4
"""Weight of the newest observation. Our choice: three of them make four fifths of the estimate."""

_MEDIAN_OF = 3  # observations: one outlier alone moves nothing, a lasting change counts after two

_SPREAD = 0.05  # of the sizes, relative: with less, overhead and rate cannot be told apart

_LEAST_RATE_SHARE = 0.25  # of the mean time: less would be noise that leaves nothing to divide


@dataclass
class Estimate:
    """Time of a side as a line: T = overhead + amount / rate.

    ``amount`` is bytes of evaluation keys, or rows. Means are exponentially weighted, of observations
    freed of outliers by the median of their last three ratios to what was expected. Not thread-safe.
    """

    overhead_s: float = 0.0
    s_per_unit: float = 0.0
    observations: int = 0
    _latest: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_MEDIAN_OF))
    _amount: float = 0.0
    _time: float = 0.0
    _variance: float = 0.0
    _covariance: float = 0.0

    @property
    def known(self) -> bool:
        """Whether anything was observed."""
        return self.observations > 0

    def seconds(self, amount: float) -> float:
        """Return the time expected for ``amount``; 0 of it take none."""
        return self.overhead_s + amount * self.s_per_unit if amount > 0 else 0.0

    def observe(self, amount: float, seconds: float) -> None:
        """Learn that ``amount``, above 0, took ``seconds``, above 0."""
        if amount <= 0 or seconds <= 0:
            return
        self.observations += 1
        if self.observations == 1:
            self._latest.append((amount, seconds))
            self._amount, self._time = amount, seconds
            self.s_per_unit = seconds / amount
            return
        self._latest.append((amount, seconds))
        # Anew by today's estimate: ratios to former ones would correct the same error twice.
        ratio = median(took / self.seconds(many) for many, took in self._latest)
        seconds = self.seconds(amount) * ratio
        ahead, late = amount - self._amount, seconds - self._time
        self._amount += WEIGHT * ahead
        self._time += WEIGHT * late
        self._variance = (1 - WEIGHT) * (self._variance + WEIGHT * ahead * ahead)
        self._covariance = (1 - WEIGHT) * (self._covariance + WEIGHT * ahead * late)
        self._fit()

    def _fit(self) -> None:
        mean = self._time / self._amount
        if self._variance > (_SPREAD * self._amount) ** 2:
            slope = self._covariance / self._variance
            slope = min(max(slope, _LEAST_RATE_SHARE * mean), mean)
            self.overhead_s = self._time - slope * self._amount
        self.overhead_s = min(self.overhead_s, (1 - _LEAST_RATE_SHARE) * self._time)
        self.s_per_unit = (self._time - self.overhead_s) / self._amount
