"""What decode steps attended to, measured beside them, without changing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hillinfer.hkm.cache import HierarchicalCache
from hillinfer.hkm.slots import EMPTY
from hillinfer.pipeline.timeline import EVALUATE, LATE, MODEL, PLACE, Span
from hillinfer.policies.base import F32, Ids, KeyCopy, all_keys, attention_mass, group_sum
from hillinfer.policies.next_layer import NextLayerQuery


@dataclass
class Sums:
    """Sums over the measured steps of one layer; `means` divides."""

    recall: list[float] = field(default_factory=list)
    captured_mass: list[float] = field(default_factory=list)
    step_overlap: list[float] = field(default_factory=list)
    query_cosine: list[float] = field(default_factory=list)

    def add(self, more: Sums) -> None:
        """Take in what another run measured of the same layer."""
        for name, each in vars(self).items():
            each += getattr(more, name)

    def means(self) -> dict[str, float | None]:
        """Return the mean of each figure, None where nothing was measured."""
        return {name: float(np.mean(each)) if each else None for name, each in vars(self).items()}


class Attended:
    """Counts the tokens that single-token steps attend to, for each KV head; an `Observer`."""

    def __init__(self) -> None:
        self.most = 0
        self._total = 0
        self._counts = 0

    def take(self) -> float | None:
        """Return the mean since the last call, None where nothing was counted."""
        mean = self._total / self._counts if self._counts else None
        self._total = self._counts = 0
        return mean

    def observe(self, cache: HierarchicalCache, layer: int, query: torch.Tensor, scaling: float) -> None:
        """Count this step, unless it is exact."""
        if query.shape[2] > 1:
            return
        slots = cache.full_layers[layer].slots
        pinned = min(int(slots.lengths[0]), slots.pinned)
        each = pinned + (slots.ids[0] != EMPTY).sum(axis=-1)
        if cache.full_layers[layer].attended_all:
            each = np.full(slots.keys.shape[1], slots.lengths[0])
        self._total += int(each.sum())
        self._counts += len(each)
        self.most = max(self.most, int(each.max()))


@dataclass
class Ranked:
    """Decode steps, layer by layer, that ranked: how many, and how many attended what was predicted.

    The others attended to what the layer's own query chose: those that ranked with it alone, and samples.
    """

    layer_steps: int = 0
    predicted: int = 0

    def add(self, spans: Sequence[Span]) -> None:
        """Count the steps of one cache's trace."""
        by_name = {
            name: {(span.step, span.layer) for span in spans if (span.lane, span.name) == (MODEL, name)}
            for name in (PLACE, EVALUATE, LATE)
        }
        self.layer_steps += len(by_name[PLACE])
        self.predicted += len(by_name[PLACE] - by_name[EVALUATE] - by_name[LATE])


class SelectionMetrics:
    """Compares each selection with what float32 keys and the exact query would choose; an `Observer`.

    recall: the share of as many tokens, besides the pinned ones, that are the same
    by the sum of products over the group. captured_mass: the share of each query
    head's attention over the whole past that falls on attended tokens, pinned ones
    included. step_overlap: the share of a selection that the step before had chosen
    too. query_cosine: of the query and its prediction from the layer before
    (`NextLayerQuery`), mean over heads.
    """

    def __init__(self, layers: dict[int, Sums], predictor: NextLayerQuery | None) -> None:
        self._layers = layers
        self._predictor = predictor
        self._copy = KeyCopy()
        self._before: dict[int, list[Ids]] = {}
        """By layer, of each KV head."""

    def observe(self, cache: HierarchicalCache, layer: int, query: torch.Tensor, scaling: float) -> None:
        """Measure this step, unless it is exact."""
        slots = cache.full_layers[layer].slots
        tokens = int(slots.lengths[0])
        first, end = slots.sinks, tokens - slots.recent
        if query.shape[2] > 1 or end <= first:
            return
        sums = self._layers.setdefault(layer, Sums())
        exact = query[0, :, 0].float().cpu().numpy()
        keys = all_keys(self._copy, cache, layer)
        mass = attention_mass(exact, keys, scaling, cache.full_layers[layer].softcap)
        scores = group_sum(exact, keys)[:, first:end]
        before, self._before[layer] = self._before.get(layer), []
        for head, slot_ids in enumerate(slots.ids[0]):
            chosen = slot_ids[slot_ids != EMPTY]
            if cache.full_layers[layer].attended_all:
                chosen = np.arange(first, end, dtype=np.uint32)
            self._before[layer].append(chosen)
            attended = np.concatenate([np.arange(first), np.arange(end, tokens), chosen])
            sums.captured_mass.append(float(mass[head][:, attended].sum(axis=-1).mean()))
            if not len(chosen):
                continue
            wanted = np.argsort(-scores[head], kind="stable")[: len(chosen)] + first
            sums.recall.append(len(np.intersect1d(wanted, chosen)) / len(chosen))
            if before is not None:
                sums.step_overlap.append(len(np.intersect1d(before[head], chosen)) / len(chosen))
        predicted = None if self._predictor is None else self._predictor.predicted.get(layer)
        if predicted is not None:
            sums.query_cosine.append(_cosine(predicted, exact))


def _cosine(one: F32, other: F32) -> float:
    norms: Any = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    # A query of zeros has no direction.
    return float(((one * other).sum(axis=-1) / np.maximum(norms, 1e-12)).mean())
