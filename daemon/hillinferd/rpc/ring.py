"""A session's ring: the calls of its hot path, without gRPC, into the same service and the same queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.message import DecodeError, Message

from hillinfer_core.arena import Arena
from hillinfer_core.errors import HillInferError, InvalidInput, name_of
from hillinfer_core.ring import (
    ENTRIES,
    PAYLOAD_BYTES,
    RING_BYTES,
    Entry,
    Method,
    Outcome,
    RingFds,
    clear_doorbell,
    daemon_ends,
    ring_doorbell,
)
from hillinfer_core.v1 import attach_pb2, cold_pool_pb2

from ..logs import get_logger
from ..service.sessions import Session
from .servicer import ColdPoolServicer

log = get_logger(__name__)

_REQUESTS: dict[int, type[Message]] = {
    Method.Evaluate: cold_pool_pb2.EvaluateRequest,
    Method.Append: cold_pool_pb2.AppendRequest,
    Method.Fetch: cold_pool_pb2.FetchRequest,
}


class RingServer:
    """Answers what ``session`` submits to its ring ``fds``, which stays the session's. One event loop.

    ``refused`` is called with the name of each error that is answered with.
    """

    def __init__(
        self,
        servicer: ColdPoolServicer,
        session: Session,
        fds: RingFds,
        refused: Callable[[str], None],
    ) -> None:
        self._tell_refused = refused
        self._session = session
        self._fds = fds
        self._submissions, self._completions = daemon_ends(Arena(fds.memory, RING_BYTES))
        self._calls: dict[int, Callable[[Session, Any, float | None], Awaitable[Message]]] = {
            Method.Evaluate: servicer.evaluate,
            Method.Append: servicer.append,
            Method.Fetch: servicer.fetch,
        }
        self._tasks: set[asyncio.Task[None]] = set()
        self.broken = asyncio.Event()
        """Set when the client broke the ring's rules or left it: nothing more is taken, end the session."""

    def start(self) -> None:
        """Begin to answer."""
        asyncio.get_running_loop().add_reader(self._fds.submitted, self._rung)

    def stop(self) -> None:
        """Take nothing more, and drop what has not been answered; the session's end frees the rest."""
        asyncio.get_running_loop().remove_reader(self._fds.submitted)
        for task in self._tasks:
            task.cancel()

    def _rung(self) -> None:
        if not clear_doorbell(self._fds.submitted):
            self._end()
            return
        try:
            entries = self._submissions.take()
            if len(entries) + len(self._tasks) > ENTRIES:
                raise InvalidInput(f"more than {ENTRIES} requests are in flight on the ring")
        except HillInferError as error:
            self._break(error)
            return
        for entry in entries:
            task = asyncio.create_task(self._serve(entry))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, entry: Entry) -> None:
        try:
            answer = (await self._answer(entry)).SerializeToString()
            if len(answer) > PAYLOAD_BYTES:
                raise InvalidInput("the answer does not fit in the ring; make this call by gRPC")
            outcome = Outcome.answered
        except HillInferError as error:
            log.debug("call refused", error=name_of(error), reason=error)
            self._tell_refused(name_of(error))
            outcome, answer = Outcome.refused, _refused(name_of(error), str(error))
        except Exception:
            log.exception("unexpected error in a call on a ring")
            message = "internal error; see the daemon's log"
            self._tell_refused(HillInferError.__name__)
            outcome, answer = Outcome.refused, _refused(HillInferError.__name__, message)
        try:
            self._completions.put(Entry(entry.ticket, outcome, 0, answer))
            ring_doorbell(self._fds.completed)
        except HillInferError as error:
            self._break(error)
        except BrokenPipeError:
            self._end()

    async def _answer(self, entry: Entry) -> Message:
        kind = _REQUESTS.get(entry.code)
        if kind is None:
            raise InvalidInput(f"the ring has no method {entry.code}")
        try:
            request = kind.FromString(entry.payload)
        except DecodeError:
            raise InvalidInput(f"the payload is not a {kind.DESCRIPTOR.name}") from None
        deadline = time.monotonic() + entry.timeout_ms / 1000 if entry.timeout_ms else None
        return await self._calls[entry.code](self._session, request, deadline)

    def _break(self, error: HillInferError) -> None:
        log.warning("a client broke its ring", session=self._session.session_id, reason=error)
        self._end()

    def _end(self) -> None:
        self.stop()
        self.broken.set()


def _refused(name: str, message: str) -> bytes:
    # A message may quote what the client sent; its end matters least.
    return attach_pb2.Refused(error=name, message=message[: PAYLOAD_BYTES // 8]).SerializeToString()
