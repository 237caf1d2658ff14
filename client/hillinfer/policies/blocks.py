"""Choosing whole blocks of neighbouring tokens."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from hillinfer.policies.base import F32, HostPolicy, Ids
from hillinfer.session import EvaluateItem


class BlockPolicy(HostPolicy):
    """Takes the blocks of the highest score; of the last one, as many tokens as the budget has left.

    Blocks begin at multiples of their size. Their tokens that are pinned anyway cost nothing.
    """

    block_tokens: ClassVar[int]

    @abstractmethod
    def block_scores(self, layer: int, item: EvaluateItem, keys: F32) -> F32:
        """Return float32 [kv_heads, blocks]; the last block may be short."""

    def choose(self, layer: int, item: EvaluateItem, keys: F32) -> Ids:
        """Block after block until the budget is spent."""
        size = self.block_tokens
        scores = self.block_scores(layer, item, keys)
        lowest, highest = item.first // size, -(-item.end // size)
        chosen = []
        for head in scores:
            order = np.argsort(-head[lowest:highest], kind="stable") + lowest
            # Two blocks may be cut short by sinks and recent window.
            order = order[: item.k // size + 3]
            ids = (order[:, None] * size + np.arange(size)).ravel()
            ids = ids[(ids >= item.first) & (ids < item.end)][: item.k]
            chosen.append(np.sort(ids))
        return np.stack(chosen).astype(np.uint32)


def starts(tokens: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the first token of each block, for `reduceat`."""
    return np.arange(0, tokens, size, dtype=np.int64)
