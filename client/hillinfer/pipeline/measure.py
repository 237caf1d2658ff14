"""What a predicted selection would have lost, seen from the exact one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from hillinfer.hkm.slots import EMPTY
from hillinfer.pipeline.choice import Predictor

if TYPE_CHECKING:
    from hillinfer.hkm.layer import HierarchicalLayer

Ids = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Sample:
    """A step that ranked with the exact query. losses: estimated for each predictor, 0 to 1.

    The estimate is the attention, of all that the step attended to, on tokens
    that the predicted set lacks: mean over heads, of the worst sequence of a
    batch. What the predicted set has instead is not counted for it.
    """

    losses: dict[Predictor, float]

    @classmethod
    def of(
        cls, layer: HierarchicalLayer, query: torch.Tensor, scaling: float, before: Ids, predicted: Ids | None
    ) -> Sample:
        """Compare the exact selection in the slots with those `before` the step and `predicted` for it.

        query: [B, H, 1, D]; before, predicted: uint32 [B, Hkv, S], ids or EMPTY.
        """
        weights = _weights(layer, query, scaling)
        ids = layer.slots.ids
        losses = {Predictor.previous_step: _lost(weights, ids, before)}
        if predicted is not None:
            losses[Predictor.next_layer] = _lost(weights, ids, predicted)
        return cls(losses)


def _weights(layer: HierarchicalLayer, query: torch.Tensor, scaling: float) -> npt.NDArray[Any]:
    """Attention on the selected slots, mean over each group of query heads: float32 [B, Hkv, selected]."""
    slots = layer.slots
    batch, kv_heads = slots.ids.shape[:2]
    grouped = query.reshape(batch, kv_heads, -1, query.shape[-1])
    scores = (grouped @ slots.keys.transpose(-1, -2)).float() * scaling
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    visible = slots.visible()
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], float("-inf"))
    weights: npt.NDArray[Any] = torch.softmax(scores, -1).mean(2)[..., slots.pinned :].cpu().numpy()
    return weights


def _lost(weights: npt.NDArray[Any], ids: Ids, other: Ids) -> float:
    shares = [
        [
            weights[row, head][(mine != EMPTY) & ~_among(mine, other[row, head])].sum()
            for head, mine in enumerate(heads)
        ]
        for row, heads in enumerate(ids)
    ]
    return float(np.mean(shares, axis=1).max())


def _among(ids: Ids, others: Ids) -> npt.NDArray[np.bool_]:
    # A table of all ids up to the greatest: EMPTY must not be one of them.
    return np.isin(ids, others[others != EMPTY], kind="table")
