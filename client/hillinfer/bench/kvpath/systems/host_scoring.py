"""All FP16 keys to the host in every step, as H2O and InfiniGen do from slower memory."""

from __future__ import annotations

import numpy as np
import torch

from hillinfer.bench.kvpath.rig import Rig, append
from hillinfer.bench.kvpath.systems.base import HostSystem, Ids, held_tokens
from hillinfer.bench.kvpath.systems.streaming import Stream
from hillinfer.session import EvaluateItem

_PIECE = 4096
"""Tokens of held keys that are widened at a time, so that they stay in the processor's cache. Our choice."""


class HostScoring(HostSystem):
    """Keys lie on the drive apart from values, so that nothing but keys is read; scores in float32.

    A piece is scored while the next is on its way. What was selected last stays in
    slots and hot pool, as for HillInfer.
    """

    name = "host_scoring"
    held = 0
    """Tokens of each layer whose keys need not be brought."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        keys = rig.workload.keys
        half = keys.shape[-1] // 2
        # A row holds a key alone, its first half in the place of K and its second in that of V.
        context = rig.context(keys.shape[1], half)
        append(context, keys[..., :half], keys[..., half:])
        self.stream = Stream(context)
        self._scores = torch.empty((keys.shape[1], keys.shape[2]))
        self._wide = torch.empty((0, keys.shape[-1]))
        self._kept = torch.empty((keys.shape[0], keys.shape[1], 0, keys.shape[3]), dtype=torch.float16)

    def choose(self, layer: int, item: EvaluateItem) -> Ids:
        """By the sum of products over the group."""
        kv_heads, tokens = self._scores.shape
        query = torch.from_numpy(item.query).view(kv_heads, -1, item.query.shape[-1]).sum(1)
        assert self.stream is not None
        for first in range(0, self.held, _PIECE):
            self._score(query, first, self._kept[layer][:, first : min(first + _PIECE, self.held)])
        for first, rows in self.stream.pieces(layer, tokens, self.held):
            self._score(query, first, torch.from_numpy(rows).flatten(2))
        ranked = self._scores[:, item.first : item.end]
        best = ranked.topk(item.k, sorted=False).indices.sort().values + item.first
        return best.numpy().astype(np.uint32)

    def _score(self, query: torch.Tensor, first: int, keys: torch.Tensor) -> None:
        # A head at a time into one buffer: seven times as fast as the whole piece at once.
        if self._wide.shape[0] < keys.shape[1]:
            self._wide = torch.empty(keys.shape[1:])
        wide = self._wide[: keys.shape[1]]
        for head, of_head in enumerate(keys):
            wide.copy_(of_head)
            torch.mv(wide, query[head], out=self._scores[head, first : first + keys.shape[1]])


class HostScoringHeld(HostScoring):
    """The same with the first tokens' keys in the memory that it may have, in place of a hot pool."""

    name = "host_scoring_held"
    hot_pool = False

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        keys = rig.workload.keys
        self.held = held_tokens(rig, keys.shape[1] * keys.shape[3] * keys.itemsize)
        self._kept = torch.from_numpy(keys[:, :, : self.held].copy())

    @property
    def resident_bytes(self) -> int:
        """The keys held."""
        return self._kept.nbytes
