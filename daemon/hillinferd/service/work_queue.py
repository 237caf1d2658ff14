"""The one queue that all work for the device passes, from whatever transport it came."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from hillinfer_core.errors import DeadlineExceeded, HillInferError, QuotaExceeded

T = TypeVar("T")

MAX_WAITING = 256
"""Entries that one session may have waiting; a bound on memory, far above what a client needs in flight."""


@dataclass(eq=False)
class _Entry:
    work: Callable[[], Awaitable[Any]]
    result: asyncio.Future[Any]
    deadline: float | None


class WorkQueue:
    """Runs one piece of work at a time: in order within a session, sessions in turn.

    Everything happens on one event loop. Work whose waiter has gone or whose deadline has passed is dropped
    before it starts; work that has started always runs to its end.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[int, deque[_Entry]] = OrderedDict()
        self._urgent: deque[_Entry] = deque()
        self._some = asyncio.Event()

    async def submit(
        self, session_id: int, work: Callable[[], Awaitable[T]], deadline: float | None = None
    ) -> T:
        """Wait for a turn, run ``work`` and return its result or raise its error.

        ``deadline`` is a ``time.monotonic()``. Raises :class:`DeadlineExceeded` if it passes before the turn
        comes, :class:`QuotaExceeded` above :data:`MAX_WAITING`, and whatever :meth:`cancel` was given.
        """
        entries = self._waiting.setdefault(session_id, deque())
        if len(entries) >= MAX_WAITING:
            raise QuotaExceeded(f"{MAX_WAITING} calls of this session wait already; wait for some to finish")
        return await self._enter(entries, work, deadline)

    async def submit_urgent(self, work: Callable[[], Awaitable[T]]) -> T:
        """Like :meth:`submit`, ahead of every session: for attaching and for freeing."""
        return await self._enter(self._urgent, work, None)

    def cancel(self, session_id: int, error: HillInferError) -> None:
        """Fail everything that waits for the session with ``error``."""
        for entry in self._waiting.pop(session_id, ()):
            if not entry.result.done():
                entry.result.set_exception(error)

    def cancel_all(self, error: HillInferError) -> None:
        """Fail everything that waits, urgent work excepted, with ``error``."""
        for session_id in list(self._waiting):
            self.cancel(session_id, error)

    async def run(self) -> None:
        """Carry out work until cancelled."""
        while True:
            entry = self._next()
            if entry is None:
                self._some.clear()
                await self._some.wait()
            elif not entry.result.done():
                await _carry_out(entry)

    async def _enter(
        self, entries: deque[_Entry], work: Callable[[], Awaitable[T]], deadline: float | None
    ) -> T:
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        entries.append(_Entry(work, result, deadline))
        self._some.set()
        return await result

    def _next(self) -> _Entry | None:
        if self._urgent:
            return self._urgent.popleft()
        if not self._waiting:
            return None
        session_id, entries = self._waiting.popitem(last=False)
        entry = entries.popleft()
        if entries:
            self._waiting[session_id] = entries
        return entry


async def _carry_out(entry: _Entry) -> None:
    if entry.deadline is not None and time.monotonic() >= entry.deadline:
        entry.result.set_exception(DeadlineExceeded("the deadline passed before the work's turn came"))
        return
    try:
        value = await entry.work()
    except Exception as error:
        if not entry.result.done():
            entry.result.set_exception(error)
    else:
        if not entry.result.done():
            entry.result.set_result(value)
