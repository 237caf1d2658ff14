"""The share of the attention that a choice of tokens holds: the arithmetic of docs/guarantee.md.

Weights are exp(score), here always as their logarithms or less the greatest of a
row, so that nothing overflows. A row is one query head of one sequence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hillinfer.apart import Apart
from hillinfer_core.mass import F64
from hillinfer_core.reference import HISTOGRAM_BINS

_SATURATED = np.iinfo(np.int32).max

Counts = npt.NDArray[np.int64]


class Shares:
    """What a ranking of `tokens` tokens says of their weights, the candidates' one by one.

    scaling and softcap are those of the attention (see `attend_part`). With `sound` the
    weights are upper bounds; without, they are what the scores say, and so are estimates.
    `ids` uint32 [rows, k] are the candidates from the heaviest on.
    """

    def __init__(
        self, found: Apart, tokens: int, scaling: float, softcap: float | None, *, sound: bool
    ) -> None:
        scale = found.scale
        low, width, ceiling = scale.low[:, None], scale.width[:, None], scale.ceiling[:, None]

        def log_weight(score: F64, error: F64 | float) -> F64:
            product = scaling * (scale.sigma[:, None] * score + scale.offset[:, None] + error)
            return product if softcap is None else softcap * np.tanh(product / softcap)

        error = scale.error[:, None] if sound else 0.0
        score = found.scores.astype(np.float64)
        top = low + HISTOGRAM_BINS * width - 1
        # A clipped key's score may exceed what the bins and 32 bits hold; `ceiling` is what is known of it.
        score = np.where((score > top) | (found.scores == _SATURATED), ceiling, score)
        order = np.argsort(-score, axis=1, kind="stable")
        self.ids = np.take_along_axis(found.ids, order, axis=1)
        score = np.take_along_axis(score, order, axis=1)
        self._upper, self._middle = log_weight(score, error), log_weight(score, 0.0)

        bins = np.arange(HISTOGRAM_BINS)
        middle = low + (bins + 0.5) * width
        edge = low + (bins + 1) * width - 1 if sound else middle.copy()
        edge[:, -1:] = np.maximum(edge[:, -1:], ceiling)
        self._counts = found.histogram.astype(np.int64)
        self._bin_upper, self._bin_middle = log_weight(edge, error), log_weight(middle, 0.0)
        self._tokens = tokens

        rest = self._counts.copy()
        place = np.clip((score - low) // width, 0, HISTOGRAM_BINS - 1).astype(np.intp)
        for row, places in enumerate(place):
            rest[row] -= np.bincount(places, minlength=HISTOGRAM_BINS)
        # Whoever is not a candidate has no more than the least of them.
        beyond = np.minimum(self._bin_upper, self._upper[:, -1:])
        with np.errstate(divide="ignore"):
            self._rest = _log_sum(np.log(np.maximum(rest, 0).astype(np.float64)) + beyond)

    def least(self, fetched: F64, share: float, *, growing: bool, has: npt.NDArray[np.bool_]) -> Counts:
        """Candidates that each row must fetch, heaviest first, to hold `share`; k + 1 where k are too few.

        fetched: log of the weight that the row has, [rows]; `growing` adds to it
        what the candidates themselves are thought to weigh, else the result is
        sure. has: bool [rows, k], candidates that are fetched already.
        """
        base = np.maximum(np.maximum(self._upper[:, 0], self._rest), fetched)[:, None]
        base = np.where(np.isfinite(base), base, 0.0)
        left = np.where(has, 0.0, np.exp(self._upper - base))
        tail = np.zeros((len(left), left.shape[1] + 1))
        tail[:, :-1] = left[:, ::-1].cumsum(axis=1)[:, ::-1]
        tail += np.exp(self._rest[:, None] - base)
        weight = np.repeat(np.exp(fetched[:, None] - base), tail.shape[1], axis=1)
        if growing:
            weight[:, 1:] += np.exp(self._middle - base).cumsum(axis=1)
        enough = tail * share <= weight * (1 - share)
        needed: Counts = np.where(enough.any(axis=1), enough.argmax(axis=1), tail.shape[1])
        return needed

    def candidates(self, fetched: F64, share: float) -> int:
        """How many candidates would be enough for `share` in every row, as far as the bins tell."""
        most = np.where(self._counts > 0, self._bin_upper, -np.inf).max(axis=1)
        base = np.maximum(most, fetched)[:, None]
        base = np.where(np.isfinite(base), base, 0.0)
        above = self._counts[:, ::-1].cumsum(axis=1)[:, ::-1]
        upper = self._counts * np.exp(np.minimum(self._bin_upper - base, 0.0))
        middle = self._counts * np.exp(np.minimum(self._bin_middle - base, 0.0))
        below = upper.cumsum(axis=1) - upper
        weight = middle[:, ::-1].cumsum(axis=1)[:, ::-1] + np.exp(fetched[:, None] - base)
        enough = below * share <= weight * (1 - share)
        # Of the bins from which on fetching is enough, the highest costs least.
        last = HISTOGRAM_BINS - 1 - enough[:, ::-1].argmax(axis=1)
        needed = np.take_along_axis(above, last[:, None], axis=1)[:, 0]
        return int(np.where(enough.any(axis=1), needed, self._tokens).max())

    def held(self, fetched: F64, has: npt.NDArray[np.bool_]) -> F64:
        """Least share that each row holds, [rows], 0 to 1; `fetched` and `has` as for `least`."""
        left = np.logaddexp(_log_sum(np.where(has, -np.inf, self._upper)), self._rest)
        share: F64 = np.exp(-np.logaddexp(0.0, left - fetched))
        return share


def _log_sum(logs: F64) -> F64:
    """Log of the sum of exp(`logs`) [rows, n]: [rows]; -inf for nothing."""
    if not logs.shape[1]:
        return np.full(len(logs), -np.inf)
    most = logs.max(axis=1)
    base = np.where(np.isfinite(most), most, 0.0)
    with np.errstate(divide="ignore"):
        total: F64 = base + np.log(np.exp(logs - base[:, None]).sum(axis=1))
    return total
