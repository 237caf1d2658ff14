"""Miss rates: seeded selections with a given overlap of steps, replayed through the client's own pools."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from hillinfer.hkm.hot_pool import HotPool
from hillinfer.hkm.pools import Pools
from hillinfer.hkm.slots import Slots

_TOKENS = 2000
"""Of the replayed context: rates depend on shares, hardly on its length. Our choice."""

_STEPS, _WARM = 80, 32

_SKEW = 1.0
"""Popularity of the n-th token is n^-skew, as in caches of many kinds. Our choice: no source fits exactly."""


@lru_cache(maxsize=256)
def miss_rate(alpha: float, held: float, overlap: float, seed: int = 0) -> float:
    """Return the share of selected rows that neither slots nor hot pool hold, 0 to 1.

    alpha, held: shares of the context. Each step keeps `overlap` of the selection before and draws the
    rest by popularity, without those it has. What was dropped may come back.
    """
    generator = np.random.default_rng(seed)
    taken, rows = max(1, round(alpha * _TOKENS)), round(held * _TOKENS)
    weights = 1.0 / np.arange(1, _TOKENS + 1) ** _SKEW
    weights = generator.permutation(weights)
    pools = Pools(Slots(1, 1, 1, 1, 1, torch.zeros(1)), HotPool(1, 1, 1, np.float32))
    pools.slots.resize(taken)
    pools.hot.resize(max(0, rows - taken))
    pools.slots.lengths[0] = _TOKENS
    chosen = _draw(generator, weights, taken)
    misses = 0
    for step in range(_STEPS):
        missing = pools.admit(0, [np.sort(chosen).astype(np.uint32)])
        pools.fill(0, missing.places, np.zeros((len(missing.ids), 2, 1), np.float32))
        pools.settle()
        misses += len(missing.ids) if step >= _WARM else 0
        kept = generator.choice(chosen, round(overlap * taken), replace=False)
        others = weights.copy()
        others[chosen] = 0.0
        chosen = np.concatenate([kept, _draw(generator, others, taken - len(kept))])
    return misses / ((_STEPS - _WARM) * taken)


def _draw(generator: np.random.Generator, weights: np.ndarray, count: int) -> np.ndarray:
    return generator.choice(len(weights), count, replace=False, p=weights / weights.sum())
