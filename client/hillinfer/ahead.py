"""A session's evaluations: waited for, or up to two of them on their way while this process computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt

from hillinfer import evaluation, wire
from hillinfer.counters import Counters
from hillinfer.evaluation import Brought, EvaluateItem, Plan
from hillinfer.link import Link
from hillinfer.ring import Submitted
from hillinfer.survival import DaemonGone
from hillinfer_core.errors import HillInferError
from hillinfer_core.layout import PAGE, Reduction
from hillinfer_core.v1 import cold_pool_pb2

_HALVES, _FOR_APPENDS = (0, 1), 2
"""Parts of the arena."""

_APPENDS = 8
"""Appends under way, at most: with the evaluations fewer than the ring has entries. Our choice."""


@dataclass(eq=False, slots=True)
class Asked:
    """What `Session.ask_ahead` began, for `Session.collect`. The session's lock covers every use.

    asked_at, begun_at: as `time.monotonic` has it, the latter once it is answered: when the daemon was done
    with what it was asked before, if that was later.
    """

    layer: int
    items: list[EvaluateItem]
    asked_at: float
    under_way: tuple[Plan, Submitted] | None
    """None once it is answered, or will not be."""
    begun_at: float = 0.0
    brought: list[Brought] | None = None
    """None while it is under way, and where it is to be sent again."""
    error: HillInferError | None = None
    """With which it ended instead."""


class Appending(NamedTuple):
    """An append under way. ended: called once, with the answer, or None if it failed or is lost."""

    submitted: Submitted
    ended: Callable[[cold_pool_pb2.AppendResponse | None], None]


class Questions:
    """Plans of evaluations, and those under way: two, in one half of the arena each, or one in all of it.

    So the daemon can go from one to the next without waiting for this process. It answers them in the order
    in which they were sent. Beside them small appends are under way, in a part of the arena of their own.
    The session's lock covers every call; each is given the attachment of the moment.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._asked: list[Asked] = []
        """Under way, the oldest first."""
        self._appending: list[Appending] = []
        self._users: list[Asked | None] = [None for _ in _HALVES]
        self._plans: dict[int | None, Plan] = {}
        """Of each half, and of the whole arena."""
        self._answered_at = 0.0
        self.waited_s = 0.0
        """Seconds in which other questions and uses of the arena waited for answers."""

    def ask(
        self,
        link: Link,
        layer: int,
        items: Sequence[EvaluateItem],
        reduction: Reduction,
        timeout_s: float,
        *,
        bring: bool,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Brought]:
        """Ask and wait; in turns where the arena has no room for all `items` at once. See `Session.rank`."""
        if not items:
            if meanwhile is not None:
                meanwhile()
            return []
        try:
            plan, _ = self._filled(link, items, reduction, bring)
        except wire.ArenaTooSmall:
            if len(items) == 1:
                raise
            half = len(items) // 2
            asked = [
                self.ask(link, layer, items[:half], reduction, timeout_s, bring=bring, meanwhile=meanwhile),
                self.ask(link, layer, items[half:], reduction, timeout_s, bring=bring),
            ]
            return asked[0] + asked[1]
        answer = link.evaluate(plan, layer, items, timeout_s, meanwhile)
        self.count(answer.results)
        return plan.taken(answer)

    def send(self, link: Link, layer: int, items: Sequence[EvaluateItem], timeout_s: float) -> Asked | None:
        """Ask and do not wait; None, and nothing sent, where one request or the ring does not do."""
        try:
            plan, halves = self._filled(link, items, Reduction.sum, bring=True)
        except wire.ArenaTooSmall:
            return None
        asked_at = time.monotonic()
        submitted = link.submit(plan, layer, items, timeout_s)
        if submitted is None:
            return None
        asked = Asked(layer, list(items), asked_at, (plan, submitted))
        self._asked.append(asked)
        for half in halves:
            self._users[half] = asked
        return asked

    def room_to_append(
        self, link: Link, shape: tuple[int, ...], dtype: npt.DTypeLike
    ) -> tuple[cold_pool_pb2.Region, npt.NDArray[Any]] | None:
        """Return where rows lie that `append` is to send; None where there is no room for them."""
        if None not in self._users and self._users[0] is self._users[1]:
            return None  # one evaluation has all of the arena
        for _ in range(2):
            staging = link.staging(_FOR_APPENDS, self._under_way)
            if not self._appending:
                staging.reset()
            if len(self._appending) < _APPENDS:
                with suppress(wire.ArenaTooSmall):
                    return staging.take(shape, dtype, PAGE)
            self.settle_appends(link)
        return None

    def append(
        self,
        link: Link,
        request: cold_pool_pb2.AppendRequest,
        timeout_s: float,
        ended: Callable[[cold_pool_pb2.AppendResponse | None], None],
    ) -> bool:
        """Send an append of rows that are there and do not wait. Say whether it was sent; see `Appending`."""
        submitted = link.submit_append(request, timeout_s)
        if submitted is not None:
            self._appending.append(Appending(submitted, ended))
        return submitted is not None

    def settle_appends(self, link: Link) -> None:
        """Wait until the daemon is done with all appends. Raises nothing."""
        start = time.perf_counter() if self._appending else None
        while self._appending:
            appending = self._appending.pop(0)
            response = None
            try:
                # Whoever appends the same then, or needs the daemon next, finds out what was wrong.
                with suppress(HillInferError):
                    response = link.answer_append(appending.submitted)
            finally:
                appending.ended(response)
        if start is not None:
            self.waited_s += time.perf_counter() - start

    def settle(self, link: Link, asked: Asked) -> None:
        """Wait until the daemon is done with it and with all sent before; keep what came. Raises nothing."""
        while asked in self._asked:
            self._settle_oldest(link)

    def settle_all(self, link: Link) -> None:
        """As `settle`, of everything under way, appends too: nothing of the arena is in use then."""
        while self._asked:
            self._make_room(link)
        self.settle_appends(link)

    def lose(self) -> None:
        """The daemon is gone, or no longer of this session."""
        for asked in self._asked:
            asked.under_way = None
        self._asked.clear()
        self._users = [None for _ in _HALVES]
        self._plans.clear()
        while self._appending:
            self._appending.pop().ended(None)

    def count(self, results: Iterable[Any]) -> None:
        """Count what the daemon scanned and read."""
        for result in results:
            self._counters.evaluated_bytes += result.evaluated_bytes
            self._counters.read_bytes += result.read_bytes

    @property
    def _under_way(self) -> int:
        return len(self._asked) + len(self._appending)

    def _make_room(self, link: Link) -> None:
        start = time.perf_counter()
        self._settle_oldest(link)
        self.waited_s += time.perf_counter() - start

    def _settle_oldest(self, link: Link) -> None:
        asked = self._asked[0]
        assert asked.under_way is not None
        # First: what was interrupted is not waited for again, and leaves the link as unfinished.
        (plan, submitted), asked.under_way = asked.under_way, None
        del self._asked[0]
        self._users = [None if user is asked else user for user in self._users]
        try:
            answer = link.answer(submitted)
        except DaemonGone:
            return  # whoever needs the daemon next finds out, and it is asked again
        except HillInferError as error:
            asked.error = error
            return
        asked.brought = plan.taken(answer)
        asked.begun_at = max(asked.asked_at, self._answered_at)
        self._answered_at = answer.answered_at
        self.count(answer.results)

    def _filled(
        self, link: Link, items: Sequence[EvaluateItem], reduction: Reduction, bring: bool
    ) -> tuple[Plan, Sequence[int]]:
        """Return a plan with the contents of `items` in it, and the halves of the arena that it uses.

        A half does where it has room for every row that could be missing; one is made free if none is.
        """
        shapes = evaluation.shapes_of(items, reduction, bring)
        if None not in self._users:
            self._make_room(link)
        half = self._users.index(None)
        place: int | None = half
        halves: Sequence[int] = (half,)
        staging = link.staging(half, self._under_way)
        plan = self._plans.get(half)
        if plan is None or plan.shapes != shapes:
            if evaluation.bytes_needed(items, bring) > staging.nbytes:
                self.settle_all(link)
                place, halves, staging = None, _HALVES, link.staging()
                plan = self._plans.get(place)
            if plan is None or plan.shapes != shapes:
                plan = self._plans[place] = Plan(staging, items, reduction, shapes, bring)
        plan.fill(items)
        return plan, halves
