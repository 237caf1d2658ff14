"""Pages by the bounds of their keys, after Quest (Tang et al., 2024)."""

from __future__ import annotations

import numpy as np

from hillinfer.policies.base import F32
from hillinfer.policies.blocks import BlockPolicy, starts
from hillinfer.session import EvaluateItem


class Quest(BlockPolicy):
    """Ranks 16-token pages by the highest product that their channel-wise key bounds allow.

    Simplified: bounds are summed over the query heads that share a KV head, and the
    bounds of a page that is not full are made anew in each step.
    """

    name = "quest"
    block_tokens = 16

    def block_scores(self, layer: int, item: EvaluateItem, keys: F32) -> F32:
        """Sum over channels of max(q * min, q * max): Quest, section 3.3."""
        at = starts(keys.shape[1], self.block_tokens)
        low, high = np.minimum.reduceat(keys, at, axis=1), np.maximum.reduceat(keys, at, axis=1)
        query = item.query.reshape(len(keys), -1, keys.shape[2])
        # max(q * min, q * max) is q+ * max + q- * min, so the heads of a group can be summed first.
        positive, negative = np.maximum(query, 0).sum(axis=1), np.minimum(query, 0).sum(axis=1)
        scores: F32 = np.einsum("hbd,hd->hb", high, positive) + np.einsum("hbd,hd->hb", low, negative)
        return scores
