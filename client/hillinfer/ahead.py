"""An evaluation asked for ahead: on its way through the ring while this process computes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from hillinfer.evaluation import Brought, EvaluateItem, Plan
from hillinfer.link import Link
from hillinfer.ring import Submitted
from hillinfer.survival import DaemonGone
from hillinfer_core.errors import HillInferError
from hillinfer_core.packed import Evaluated


@dataclass(eq=False, slots=True)
class Asked:
    """What `Session.ask_ahead` began, for `Session.collect`. The session's lock covers every call.

    asked_at: as `time.monotonic` has it.
    """

    layer: int
    items: list[EvaluateItem]
    asked_at: float
    _under_way: tuple[Plan, Submitted] | None
    brought: list[Brought] | None = None
    """None while it is under way, and where it is to be sent again."""
    error: HillInferError | None = None
    """With which it ended instead."""

    @classmethod
    def send(
        cls, link: Link, plan: Plan, layer: int, items: Sequence[EvaluateItem], timeout_s: float
    ) -> Self | None:
        """Send it as `plan`, which is filled, and do not wait; None where the ring does not take it.

        Until `settle` the daemon may use the arena.
        """
        asked_at = time.monotonic()
        submitted = link.submit(plan, layer, items, timeout_s)
        return None if submitted is None else cls(layer, list(items), asked_at, (plan, submitted))

    def settle(self, link: Link) -> Sequence[Evaluated]:
        """Wait until the daemon is done with it, and keep what came; return the results. Raises nothing."""
        if self._under_way is None:
            return ()
        # First: what was interrupted is not waited for again, and leaves the link as unfinished.
        (plan, submitted), self._under_way = self._under_way, None
        try:
            answer = link.answer(submitted)
        except DaemonGone:
            return ()  # whoever needs the daemon next finds out, and it is asked again
        except HillInferError as error:
            self.error = error
            return ()
        self.brought = plan.taken(answer)
        return answer.results

    def lose(self) -> None:
        """Its daemon is gone, or no longer of this session."""
        self._under_way = None
