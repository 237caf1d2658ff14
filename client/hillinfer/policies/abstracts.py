"""Chunks by an abstract of their keys, after LeoAM."""

from __future__ import annotations

import numpy as np

from hillinfer.policies.base import F32, group_sum
from hillinfer.policies.blocks import BlockPolicy, starts
from hillinfer.session import EvaluateItem


class Abstracts(BlockPolicy):
    """Ranks chunks by the product of the query and the mean of their keys.

    Simplified: chunks of 8 tokens, not of variable length, so that abstracts are an
    eighth of the key bytes as LeoAM's are (13 %); the mean as the abstract.
    """

    name = "abstracts"
    block_tokens = 8

    def block_scores(self, layer: int, item: EvaluateItem, keys: F32) -> F32:
        """Products with the mean keys, summed over the group."""
        at = starts(keys.shape[1], self.block_tokens)
        counts = np.diff(np.append(at, keys.shape[1])).astype(np.float32)
        sums: F32 = np.add.reduceat(keys, at, axis=1)
        return group_sum(item.query, sums / counts[:, None])
