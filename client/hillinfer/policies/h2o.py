"""Permanent eviction by accumulated attention, after H2O (Zhang et al., 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hillinfer.policies.base import F32, HostPolicy, Ids, Reading, all_keys
from hillinfer.session import EvaluateItem

if TYPE_CHECKING:
    from hillinfer.hkm.cache import HierarchicalCache

_QUERY_BLOCK = 256  # queries per score matrix


class H2O(HostPolicy):
    """Keeps the tokens that got the most attention so far; what is dropped once is dropped for ever.

    The context, and the first question as part of the prompt, are read exactly;
    then the cache shrinks to the budget. Simplified: the heads of a group share one
    choice, as they share one KV head, by the sum of their mass; the recent half of
    H2O's budget is HKM's recent window.
    """

    name = "h2o"
    evicts = True
    needs_mass = True

    def __init__(self, model: Any, reading: Reading) -> None:
        super().__init__(model, reading)
        self._mass = dict(reading.mass)
        self._dropped: dict[int, np.ndarray[Any, np.dtype[np.bool_]]] = {}

    def choose(self, layer: int, item: EvaluateItem, keys: F32) -> Ids:
        """Drop what the budget has no room for, and attend to the rest."""
        tokens = keys.shape[1]
        mass, dropped = self._room(layer, tokens)
        kept = np.where(dropped, -np.inf, mass)[:, item.first : item.end]
        order = np.argsort(-kept, axis=-1, kind="stable")
        np.put_along_axis(dropped, order[:, item.k :] + item.first, True, axis=-1)
        alive = [np.flatnonzero(~each[item.first : item.end]) + item.first for each in dropped]
        return np.stack(alive).astype(np.uint32)

    def observe(self, cache: HierarchicalCache, layer: int, query: torch.Tensor, scaling: float) -> None:
        """Add this step's attention over what is left."""
        keys = all_keys(self.copy, cache, layer)
        mass, dropped = self._room(layer, keys.shape[1])
        add_mass(mass, query[0], keys, scaling, cache.full_layers[layer].softcap, dropped)

    def _room(self, layer: int, tokens: int) -> tuple[F32, np.ndarray[Any, np.dtype[np.bool_]]]:
        mass = self._mass[layer]
        dropped = self._dropped.get(layer, np.zeros(mass.shape, np.bool_))
        # Copies, so that the reading's own is left as it is for other budgets.
        new = ((0, 0), (0, tokens - mass.shape[1]))
        self._mass[layer] = mass = np.pad(mass, new)
        self._dropped[layer] = dropped = np.pad(dropped, new)
        return mass, dropped


def add_mass(
    mass: F32,
    query: torch.Tensor,
    keys: F32,
    scaling: float,
    softcap: float | None,
    dropped: np.ndarray[Any, np.dtype[np.bool_]] | None = None,
) -> None:
    """Add to `mass` [Hkv, n] what the last queries [H, q, D] give to each of `keys` [Hkv, n, D].

    Query i of q sees keys 0 .. n-q+i, without those `dropped` (bool [Hkv, n]).
    """
    kv_heads, tokens, dim = keys.shape
    grouped = query.detach().float().cpu().reshape(kv_heads, -1, query.shape[1], dim)
    transposed = torch.from_numpy(np.ascontiguousarray(keys)).transpose(1, 2)
    hidden = None if dropped is None or not dropped.any() else torch.from_numpy(dropped)[:, None, None]
    for start in range(0, query.shape[1], _QUERY_BLOCK):
        block = grouped[:, :, start : start + _QUERY_BLOCK]
        seen = tokens - query.shape[1] + start + block.shape[2]
        scores = torch.matmul(block, transposed[:, None, :, :seen]) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        rows = torch.arange(seen - block.shape[2], seen)[:, None]
        scores.masked_fill_(torch.arange(seen)[None] > rows, float("-inf"))
        if hidden is not None:
            scores.masked_fill_(hidden[..., :seen], float("-inf"))
        mass[:, :seen] += torch.softmax(scores, dim=-1).sum(dim=(1, 2)).numpy()
