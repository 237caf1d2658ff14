"""The one queue that all work for the device passes, from whatever transport it came."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from hillinfer_core.errors import DeadlineExceeded, HillInferError

from ..logs import get_logger
from .fair_share import FairShare

log = get_logger(__name__)

T = TypeVar("T")

BULK_SHARE = 0.2
"""Device time that bulk work gets while decode could use it all. Our choice."""


class Priority(Enum):
    """What somebody waits for at every token, and what is large and can wait."""

    decode = "decode"
    bulk = "bulk"


class Flow(Protocol):
    """Whose work it is; what each is given of the device is in proportion to the weights."""

    @property
    def session_id(self) -> int:
        """Number of the session."""

    @property
    def weight(self) -> float:
        """Above 0; looked at whenever the session was served."""


class Piece(NamedTuple):
    """One piece of work that left the queue: times in seconds.

    ``error`` is what it failed with, also without having run (``service_s`` is 0 then): cancelled, or
    past its deadline. ``flow`` is the session; it and ``priority`` are None for work of the daemon itself.
    """

    operation: str
    flow: Flow | None
    priority: Priority | None
    queue_s: float
    service_s: float
    error: BaseException | None


Observer = Callable[[Piece], None]
"""Called on the event loop when a piece is done; must not block. What it raises is logged."""

End = Callable[[Any, Exception | None], None]
"""Called once with what a piece of work came to: a result, or an error."""


class Result(Protocol):
    """Where the outcome of a piece goes: a future, or whatever needs no task. No method may raise."""

    def done(self) -> bool:
        """Whether nobody waits for an outcome (any more)."""

    def set_result(self, value: Any, /) -> None:
        """Take the result, once."""

    def set_exception(self, error: Exception, /) -> None:
        """Take the error instead."""


@dataclass(eq=False, slots=True)
class _Entry:
    operation: str
    begin: Callable[[End], None]
    result: Result
    deadline: float | None
    priority: Priority | None
    flow: Flow | None
    since: float
    began: float | None = None


class WorkQueue:
    """Runs one piece of work at a time: in order within a session, sessions by weighted fair queueing.

    Decode goes before bulk. But bulk that waits gets :data:`BULK_SHARE` of the device, or a piece for each
    piece of decode if that is less: decode never waits for two pieces of bulk in a row. The device is never
    idle while something waits.

    Everything happens on one event loop. Work whose waiter has gone or whose deadline has passed is dropped
    before it starts; work that has started always runs to its end. ``clock`` counts seconds and never goes
    back.
    """

    def __init__(self, observe: Observer | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.observe = observe
        self.done = 0
        """Pieces carried out so far."""
        self._open = False
        self._running = False
        self._pumping = False
        self._task: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._clock = clock
        self._waiting: dict[int, deque[_Entry]] = {}
        self._urgent: deque[_Entry] = deque()
        self._untold: deque[Piece] = deque()
        self._decode, self._bulk = FairShare(), FairShare()
        self._bulk_due = 0.0

    @property
    def busy(self) -> bool:
        """Whether a piece runs or waits."""
        return self._running or bool(self._urgent) or any(self._waiting.values())

    @property
    def idle(self) -> bool:
        """Whether what enters now would begin at once."""
        return self._open and not self._pumping and not self.busy

    @property
    def waiting(self) -> int:
        """How many pieces wait, without the one that runs."""
        return len(self._urgent) + sum(map(len, self._waiting.values()))

    async def submit(
        self,
        flow: Flow,
        work: Callable[[], Awaitable[T]],
        deadline: float | None = None,
        *,
        operation: str = "",
        priority: Priority = Priority.decode,
    ) -> T:
        """Wait for a turn, run ``work`` and return its result or raise its error.

        ``deadline`` is a time of the queue's clock. Raises :class:`DeadlineExceeded` if it passes before the
        turn comes, and whatever :meth:`cancel` was given.
        """
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.enter(flow, partial(self._run, work), result, deadline, operation=operation, priority=priority)
        return await result

    def enter(
        self,
        flow: Flow,
        begin: Callable[[End], None],
        result: Result,
        deadline: float | None = None,
        *,
        operation: str = "",
        priority: Priority = Priority.decode,
        began: float | None = None,
    ) -> None:
        """Like :meth:`submit`, for work that needs no task: one costs as much as a short piece of work.

        When its turn comes ``begin`` is called, must not block, and calls what it is given when the work has
        ended, at once or later. Unless ``result`` is done by then it gets the outcome, and may enter the next
        piece of the same work while it does. ``began`` is for what began already at that time of the clock,
        while the queue was :attr:`idle`: it runs at once.
        """
        since = self._clock() if began is None else began
        entries = self._waiting.setdefault(flow.session_id, deque())
        entries.append(_Entry(operation, begin, result, deadline, priority, flow, since, began))
        self._pump()

    async def submit_urgent(self, work: Callable[[], Awaitable[T]], *, operation: str = "") -> T:
        """Like :meth:`submit`, ahead of every session and charged to none: for attaching and for freeing."""
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        begin = partial(self._run, work)
        self._urgent.append(_Entry(operation, begin, result, None, None, None, self._clock()))
        self._pump()
        return await result

    def cancel(self, session_id: int, error: HillInferError) -> None:
        """Fail everything that waits for the session with ``error``."""
        for entry in self._waiting.pop(session_id, ()):
            self._drop(entry, error)
        self._decode.forget(session_id)
        self._bulk.forget(session_id)

    def cancel_all(self, error: HillInferError) -> None:
        """Fail everything that waits, urgent work excepted, with ``error``."""
        for session_id in list(self._waiting):
            self.cancel(session_id, error)

    async def run(self) -> None:
        """Carry out work until cancelled; then the task of what runs is cancelled too."""
        self._open = True
        self._ended = asyncio.get_running_loop().create_future()
        self._pump()
        try:
            # Nothing but an error of the queue itself.
            await self._ended
        finally:
            self._open = False
            if self._task is not None:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)

    async def step(self) -> bool:
        """Carry out the next piece, where nothing :meth:`run`; return whether there was one."""
        entry = self._next()
        if entry is None:
            return False
        self._begin(entry)
        while self._running:
            await asyncio.sleep(0)
        return True

    def _pump(self) -> None:
        """Begin the next piece unless one runs. A loop, as a piece may end while it begins."""
        if not self._open or self._pumping:
            return
        self._pumping = True
        try:
            while not self._running and (entry := self._next()) is not None:
                self._begin(entry)
        except Exception as error:
            self._open = False
            if self._ended is not None and not self._ended.done():
                self._ended.set_exception(error)
        finally:
            self._pumping = False

    def _begin(self, entry: _Entry) -> None:
        self._running = True
        contended = self._is_contended(entry)
        started = self._clock() if entry.began is None else entry.began

        def end(value: Any, error: Exception | None) -> None:
            seconds = self._clock() - started
            self.done += 1
            self._charge(entry, seconds, contended)
            # First of all to whoever waits; what it enters at once is heard before the next one is chosen.
            _settle(entry.result, value, error)
            self._note(entry, started, seconds, error)
            if self._task is None:
                self._running = False
                # The device goes on before what was done is told.
                self._pump()
                self._tell()
            else:
                # The same for a task that submits: it goes on in the loop's next turn.
                self._task = None
                self._tell()
                asyncio.get_running_loop().call_soon(self._heard)

        try:
            entry.begin(end)
        except Exception as error:
            end(None, error)

    def _heard(self) -> None:
        self._running = False
        self._pump()

    def _run(self, work: Callable[[], Awaitable[T]], end: End) -> None:
        async def carry_out() -> None:
            try:
                value = await work()
            except asyncio.CancelledError:
                if self._ended is not None:
                    self._ended.cancel()
                raise
            except Exception as error:
                end(None, error)
            else:
                end(value, None)

        self._task = asyncio.create_task(carry_out())

    def _next(self) -> _Entry | None:
        while self._urgent:
            entry = self._urgent.popleft()
            if not entry.result.done():
                return entry
        decode, bulk = self._heads()
        if not decode and not bulk:
            # Nobody waits, so nobody is ahead of anybody.
            self._waiting.clear()
            self._decode.reset()
            self._bulk.reset()
            self._bulk_due = 0.0
            return None
        if self._is_bulks_turn(decode, bulk):
            return self._waiting[self._bulk.first(bulk)].popleft()
        return self._waiting[self._decode.first(decode)].popleft()

    def _heads(self) -> tuple[list[int], list[int]]:
        """Return sessions whose next piece is decode, and bulk, having dropped what will not run any more."""
        now = self._clock()
        decode: list[int] = []
        bulk: list[int] = []
        # A list: whoever hears of an error may submit something else at once.
        for session_id, entries in list(self._waiting.items()):
            while entries and (entries[0].result.done() or _is_late(entries[0], now)):
                self._drop(
                    entries.popleft(), DeadlineExceeded("the deadline passed before the work's turn came")
                )
            if entries:
                (decode if entries[0].priority is Priority.decode else bulk).append(session_id)
        return decode, bulk

    def _is_bulks_turn(self, decode: list[int], bulk: list[int]) -> bool:
        if not bulk:
            # Who does not wait is owed nothing.
            self._bulk_due = 0.0
            return False
        # Never above 0 after a piece of bulk, so that decode is next after it.
        return not decode or self._bulk_due > 0

    def _charge(self, entry: _Entry, seconds: float, contended: bool) -> None:
        if entry.flow is None or entry.priority is None:
            return
        # Not to a session that ended meanwhile: nobody would forget it again.
        if entry.flow.session_id in self._waiting:
            share = self._decode if entry.priority is Priority.decode else self._bulk
            share.charge(entry.flow.session_id, entry.flow.weight, seconds)
        if entry.priority is Priority.bulk:
            paid = seconds * (1 - BULK_SHARE) if contended else 0.0
            self._bulk_due = min(0.0, self._bulk_due - paid)
        elif contended:
            self._bulk_due += seconds * BULK_SHARE

    def _is_contended(self, entry: _Entry) -> bool:
        return any(
            entries and entries[0].priority is not entry.priority for entries in self._waiting.values()
        )

    def _drop(self, entry: _Entry, error: HillInferError) -> None:
        left = entry.result.done()
        if not left:
            entry.result.set_exception(error)
        self._note(entry, self._clock(), 0.0, asyncio.CancelledError() if left else error)
        self._tell()

    def _note(self, entry: _Entry, started: float, seconds: float, error: BaseException | None) -> None:
        queue_s = started - entry.since
        self._untold.append(Piece(entry.operation, entry.flow, entry.priority, queue_s, seconds, error))

    def _tell(self) -> None:
        """Tell of pieces in the order in which they ended, also where one ends inside another's end."""
        while self._untold:
            piece = self._untold.popleft()
            if self.observe is None:
                continue
            try:
                self.observe(piece)
            except Exception:
                # Whoever only looks on must not stop the work.
                log.exception("an observer of the queue failed", operation=piece.operation)


def _settle(result: Result, value: Any, error: Exception | None) -> None:
    if result.done():
        return
    try:
        if error is None:
            result.set_result(value)
        else:
            result.set_exception(error)
    except Exception:
        # It must not, and if it does the others' work goes on.
        log.exception("the result of work was not taken")


def _is_late(entry: _Entry, now: float) -> bool:
    return entry.deadline is not None and now >= entry.deadline
