"""Blocks of neighbouring tokens by an abstract of their keys in DRAM, as LeoAM and SolidAttention do."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from hillinfer.bench.kvpath.rig import Rig
from hillinfer.bench.kvpath.systems.base import HostSystem, Ids
from hillinfer.session import EvaluateItem


class Blocks(HostSystem):
    """Ranks blocks by the product of the query and the mean of their keys, and takes the best.

    All abstracts are in DRAM and counted as resident, which is kinder than LeoAM's, which come from the disk.
    """

    block_tokens: ClassVar[int]

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        keys = torch.from_numpy(rig.workload.keys)
        layers, heads, tokens, dim = keys.shape
        whole = tokens // self.block_tokens
        self._abstracts = (
            keys[:, :, : whole * self.block_tokens]
            .reshape(layers, heads, whole, self.block_tokens, dim)
            .float()
            .mean(3)
        )

    @property
    def resident_bytes(self) -> int:
        """The abstracts, as FP16."""
        return int(self._abstracts.numel()) * 2

    def choose(self, layer: int, item: EvaluateItem) -> Ids:
        """Whole blocks; of the last, what the budget leaves."""
        size, abstracts = self.block_tokens, self._abstracts[layer]
        query = torch.from_numpy(item.query).view(len(abstracts), -1, item.query.shape[-1]).sum(1)
        scores = (abstracts @ query[:, :, None])[..., 0]
        lowest, highest = -(-item.first // size), item.end // size
        wanted = min(-(-item.k // size), highest - lowest)
        order = scores[:, lowest:highest].topk(wanted).indices.numpy() + lowest
        ids = (order[:, :, None] * size + np.arange(size)).reshape(len(order), -1)[:, : item.k]
        return np.sort(ids, axis=-1).astype(np.uint32)


class KeyAbstracts(Blocks):
    """Chunks of 8 tokens: abstracts are an eighth of the keys' bytes, as LeoAM's are (13 %)."""

    name = "key_abstracts"
    block_tokens = 8


class PreviousStepBlocks(Blocks):
    """Blocks of 32 tokens, as SolidAttention's (FAST'26).

    Those of the step before lie in the slots already, its free prefetch; the others are fetched late.
    """

    name = "previous_step_blocks"
    block_tokens = 32
    hot_pool = False
