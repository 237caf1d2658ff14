"""Follows the exact reading of a context, for policies that begin with what it leaves behind."""

from __future__ import annotations

import numpy as np
import torch

from hillinfer.hkm.cache import HierarchicalCache
from hillinfer.policies.base import KeyCopy, Reading, all_keys
from hillinfer.policies.h2o import add_mass


class Reader:
    """Fills `reading`. with_mass: the attention of all queries too, which costs about as much as reading."""

    def __init__(self, tokens: int, with_mass: bool) -> None:
        self.reading = Reading(tokens)
        self._copy = KeyCopy() if with_mass else None

    def observe(self, cache: HierarchicalCache, layer: int, query: torch.Tensor, scaling: float) -> None:
        """See `hillinfer.hkm.cache.Observer`."""
        reading = self.reading
        reading.scaling[layer] = scaling
        reading.softcap[layer] = softcap = cache.full_layers[layer].softcap
        reading.last_query[layer] = query[0, :, -1].float().cpu().numpy()
        if self._copy is None:
            return
        keys = all_keys(self._copy, cache, layer)
        if layer not in reading.mass:
            reading.mass[layer] = np.zeros((len(keys), reading.tokens), np.float32)
        add_mass(reading.mass[layer][:, : keys.shape[1]], query[0], keys, scaling, softcap)
