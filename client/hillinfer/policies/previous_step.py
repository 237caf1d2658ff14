"""The blocks that the previous step would have chosen, after SolidAttention (FAST'26)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hillinfer.policies.base import F32, Reading, group_sum
from hillinfer.policies.blocks import BlockPolicy, starts
from hillinfer.session import EvaluateItem

if TYPE_CHECKING:
    from hillinfer.hkm.cache import HierarchicalCache


class PreviousStep(BlockPolicy):
    """Attends to the 32-token blocks that the layer's query of one step before ranks highest.

    Simplified: blocks that the prefetch missed are not fetched late, which
    SolidAttention does: this is what the free prefetch is worth alone. A block
    counts as its best token.
    """

    name = "previous_step"
    block_tokens = 32

    def __init__(self, model: Any, reading: Reading) -> None:
        super().__init__(model, reading)
        self._query = dict(reading.last_query)

    def block_scores(self, layer: int, item: EvaluateItem, keys: F32) -> F32:
        """The best product of each block, of the previous query."""
        scores: F32 = np.maximum.reduceat(
            group_sum(self._query[layer], keys), starts(keys.shape[1], self.block_tokens), axis=1
        )
        return scores

    def observe(self, cache: HierarchicalCache, layer: int, query: torch.Tensor, scaling: float) -> None:
        """Keep the last query for the next step."""
        self._query[layer] = query[0, :, -1].float().cpu().numpy()
