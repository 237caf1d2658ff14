"""HillInfer, whole and in part."""

from __future__ import annotations

from collections.abc import Sequence

from hillinfer.bench.kvpath.systems.base import System
from hillinfer.hkm.policy import ColdPoolRanking
from hillinfer.session import Brought, EvaluateItem, Session


class HkmOnly(System):
    """The drive ranks everything and the host waits for it: HKM without APP."""

    name = "hkm_only"

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        """One round trip."""
        return ColdPoolRanking().select(session, layer, items)
