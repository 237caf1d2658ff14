"""HillInfer, whole and in part."""

from __future__ import annotations

from collections.abc import Sequence

from hillinfer.bench.kvpath.rig import Rig
from hillinfer.bench.kvpath.systems.base import System
from hillinfer.hkm.policy import ColdPoolRanking
from hillinfer.session import Brought, EvaluateItem, Session
from hillinfer.split.ranking import SplitRanking


class HillInfer(System):
    """Drive and CPU rank at once, each its part; mirrored keys take at most an eighth of `resident`."""

    name = "hillinfer"

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        self._ranking = SplitRanking(limit_bytes=rig.resident // 8)

    @property
    def resident_bytes(self) -> int:
        """The mirrored keys."""
        return self._ranking.mirrored_bytes

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        """See `SplitRanking.select`."""
        return self._ranking.select(session, layer, items)

    def close(self) -> None:
        """Drop the mirror."""
        self._ranking.close()


class HkmOnly(System):
    """The drive ranks everything and the host waits for it: HKM without APP."""

    name = "hkm_only"

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        """One round trip."""
        return ColdPoolRanking().select(session, layer, items)
