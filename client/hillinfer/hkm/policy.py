"""Which past tokens a decode step attends to besides sinks and recent window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hillinfer.session import Brought, EvaluateItem, Session


class SelectionPolicy(Protocol):
    """Selects tokens and brings the rows that the slots and the hot pool lack."""

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        """Return the selection for each sequence of the batch, or None to attend to nothing more. Blocks."""
        ...


class ColdPoolRanking:
    """Lets the drive rank every past token by its evaluation keys: HillInfer's own policy."""

    def asked(self, layer: int, items: Sequence[EvaluateItem]) -> list[EvaluateItem]:
        """Return what the drive is asked for `items`: themselves."""
        return list(items)

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        """See `SelectionPolicy.select`; one round trip to the daemon."""
        return session.evaluate_and_bring(layer, self.asked(layer, items))


class RecentOnly:
    """Attends to sinks and recent window only, however large the budget: the baseline that forgets."""

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        """Attend to nothing beyond the pinned tokens."""
        return None
