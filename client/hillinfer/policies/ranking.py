"""HillInfer itself."""

from __future__ import annotations

from collections.abc import Sequence

from hillinfer.hkm.policy import ColdPoolRanking
from hillinfer.policies.base import Comparison
from hillinfer.session import Brought, EvaluateItem, Session


class Ranking(Comparison):
    """The drive ranks all past tokens by their quantised keys, with the exact query: `ColdPoolRanking`."""

    name = "hillinfer"

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        """One round trip to the daemon."""
        return ColdPoolRanking().select(session, layer, items)
