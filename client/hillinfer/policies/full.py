"""Full attention: every past token in every step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hillinfer.policies.base import F32, HostPolicy, Ids
from hillinfer.session import EvaluateItem
from hillinfer_core.units import Budget

if TYPE_CHECKING:
    from hillinfer.hkm.cache import HkmConfig


class Full(HostPolicy):
    """Attends to everything, whatever the budget asked for: what all others are measured against."""

    name = "full"

    def config(self, config: HkmConfig) -> HkmConfig:
        """A budget of everything, and room for its slots."""
        return replace(config, budget=Budget(alpha=1.0), resident=3 * config.resident)

    def choose(self, layer: int, item: EvaluateItem, keys: F32) -> Ids:
        """All of them."""
        return np.tile(np.arange(item.first, item.end, dtype=np.uint32), (len(keys), 1))
