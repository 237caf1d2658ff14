"""Evaluations on their way through a drive's queue, by callbacks: a task costs as much as a short one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from ..domain.contexts import Context
from ..worker import messages
from .sessions import Session
from .usage import Usage
from .work_queue import End, Result, WorkQueue

Prepared = tuple[list[messages.Evaluate], list[Context]]
"""A request cut in pieces, and which of its contexts the worker has to load first."""


class Evaluating:
    """One request of ``session``: each of its pieces takes a turn, in order.

    ``result`` gets what came of all, by :func:`hillinfer_core.packed.pack_results`; ``usages`` count winners.

    ``prepare`` is called in every turn, as contexts may have been closed or lost since the last one; ``load``
    has the worker know contexts; ``send`` has it carry out a piece. ``began`` is when the request, of one
    piece, was sent already. One event loop.
    """

    def __init__(
        self,
        queue: WorkQueue,
        session: Session,
        deadline: float | None,
        result: Result,
        *,
        prepare: Callable[[], Prepared],
        load: Callable[[list[Context]], Awaitable[None]],
        send: Callable[[messages.Evaluate, End], None],
        usages: Sequence[Usage],
        began: float | None = None,
    ) -> None:
        self._queue = queue
        self._session = session
        self._deadline = deadline
        self._result = result
        self._prepare = prepare
        self._load = load
        self._send = send
        self._usages = usages
        self._began = began
        self._evaluated: list[bytes] = []
        self._winners = 0
        self._missing = 0
        self._pieces = 0
        self._loading: asyncio.Task[None] | None = None

    def enter(self) -> None:
        """Wait for the next piece's turn."""
        self._queue.enter(
            self._session, self._begin, self, self._deadline, operation="evaluate", began=self._began
        )

    def done(self) -> bool:
        """Whether nobody waits for the result (any more)."""
        return self._result.done()

    def set_result(self, done: messages.Done) -> None:
        """Take what the worker said of a piece."""
        self._evaluated.append(done.evaluated)
        self._winners += done.winners
        self._missing += done.missing
        if len(self._evaluated) < self._pieces:
            self.enter()
            return
        for usage in self._usages:
            usage.rank(self._winners, self._missing)
        self._result.set_result(b"".join(self._evaluated))

    def set_exception(self, error: Exception) -> None:
        """Fail as a whole: with one piece, or before its turn came."""
        self._result.set_exception(error)

    def _begin(self, end: End) -> None:
        pieces, unknown = self._prepare()
        self._pieces = len(pieces)
        piece = pieces[len(self._evaluated)]
        if unknown:
            self._loading = asyncio.create_task(self._begin_with(unknown, piece, end))
        else:
            self._send(piece, end)

    async def _begin_with(self, unknown: list[Context], piece: messages.Evaluate, end: End) -> None:
        try:
            await self._load(unknown)
        except Exception as error:
            end(None, error)
        else:
            self._send(piece, end)
