"""Sinks and a recent window, after StreamingLLM (Xiao et al., 2024): the baseline that forgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hillinfer.hkm.policy import RecentOnly
from hillinfer.policies.base import Comparison
from hillinfer.session import Brought, EvaluateItem, Session

if TYPE_CHECKING:
    from hillinfer.hkm.cache import HkmConfig


class Recent(Comparison):
    """Spends the whole budget on the first and the latest tokens.

    Simplified: positions are those of the text, not of the cache.
    """

    name = "recent"

    def config(self, config: HkmConfig) -> HkmConfig:
        """A window of all that the budget leaves, fixed at the length of the context."""
        return replace(config, recent=config.budget.of(self.reading.tokens) - config.sinks)

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        """Nothing beyond the pinned tokens."""
        return RecentOnly().select(session, layer, items)
