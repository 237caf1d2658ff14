"""A session's ring: the calls of its hot path, without gRPC, into the same service and the same queue."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from google.protobuf.message import DecodeError, Message

from hillinfer_core.arena import Arena
from hillinfer_core.errors import HillInferError, InvalidInput, name_of
from hillinfer_core.layout import Reduction
from hillinfer_core.packed import Request, Unpacker, pack_answer, unpack_results
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
)
from hillinfer_core.v1 import attach_pb2, cold_pool_pb2

from ..logs import get_logger
from ..service import requests
from ..service.calls import Call
from ..service.cold_pool import ColdPoolService
from ..service.express import Flight, Run
from ..service.sessions import Session
from .servicer import ColdPoolServicer, evaluate_ask, evaluate_response

log = get_logger(__name__)

_REQUESTS: dict[int, type[Message]] = {
    Method.Evaluate: cold_pool_pb2.EvaluateRequest,
    Method.Append: cold_pool_pb2.AppendRequest,
    Method.Fetch: cold_pool_pb2.FetchRequest,
}


class RingServer:
    """Answers what ``session`` submits to its ring ``fds``, which stays the session's. One event loop.

    Evaluations go the whole way by callbacks, without a task: each token asks for one in every layer.
    Errors that it answers with are counted by the service.
    """

    def __init__(
        self,
        service: ColdPoolService,
        servicer: ColdPoolServicer,
        session: Session,
        fds: RingFds,
    ) -> None:
        self._service = service
        self._session = session
        self._fds = fds
        self._submissions, self._completions = daemon_ends(Arena(fds.memory, RING_BYTES))
        self._methods: dict[int, Callable[[Session, Any, float | None], Awaitable[Message]]] = {
            Method.Append: servicer.append,
            Method.Fetch: servicer.fetch,
        }
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: dict[int, Call] = {}
        self._numbers = itertools.count()
        self._since: list[float] = []
        self._taking = False
        self._unpacker = Unpacker(_terms)
        self.broken = asyncio.Event()
        """Set when the client broke the ring's rules or left it: nothing more is taken, end the session."""

    def start(self) -> None:
        """Begin to answer."""
        self._taking = True
        asyncio.get_running_loop().add_reader(self._fds.submitted, self._rung)
        if (express := self._service.express) is not None:
            express.add(self._session.session_id, self._submissions, self._completions, self._fds, self)

    def stop(self) -> None:
        """Take nothing more, and drop what has not been answered; the session's end frees the rest."""
        self._taking = False
        asyncio.get_running_loop().remove_reader(self._fds.submitted)
        if self._service.express is not None:
            self._service.express.remove(self._fds)
        for task in self._tasks:
            task.cancel()
        for call in list(self._calls.values()):
            call.give_up()
        self._calls.clear()

    def note(self, drive: int, run: Run) -> None:
        """Account what the express carried of this ring."""
        self._service.drives[drive].evaluations.note(self._session, run)

    def go_on(self, flight: Flight) -> None:
        """Take over what the express has sent to the worker."""
        try:
            self._evaluate(flight.entry, None, flight.began)
        finally:
            self._service.drives[flight.drive].evaluations.took_over(flight.answer)

    def expect(self, since: list[float]) -> None:
        """Take times at which entries that wait were seen in the ring: deadlines count from there."""
        self._since = since

    def leave(self) -> None:
        """End: the client does not listen any more."""
        self._end()

    def _rung(self) -> None:
        if not clear_doorbell(self._fds.submitted):
            self._end()
            return
        try:
            entries = self._submissions.take()
            if len(entries) + len(self._tasks) + len(self._calls) > ENTRIES:
                raise InvalidInput(f"more than {ENTRIES} requests are in flight on the ring")
        except HillInferError as error:
            self._break(error)
            return
        since, self._since = self._since + [time.monotonic()] * len(entries), []
        loop, following = asyncio.get_running_loop(), False
        for entry, at in zip(entries, since, strict=False):
            if self.broken.is_set():
                return
            deadline = at + entry.timeout_ms / 1000 if entry.timeout_ms else None
            if entry.code in (Method.Evaluate, Method.EvaluatePacked):
                if following:
                    loop.call_soon(self._evaluate, entry, deadline)
                else:
                    self._evaluate(entry, deadline)
            else:
                # A task enters the queue in the loop's next turn: what was submitted after it follows it.
                following = True
                task = asyncio.create_task(self._serve(entry, deadline))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _evaluate(self, entry: Entry, deadline: float | None, began: float | None = None) -> None:
        if not self._taking:
            return
        number = next(self._numbers)
        ask: requests.Evaluate | None = None

        def answer(results: bytes, error: Exception | None) -> None:
            self._calls.pop(number, None)
            if error is not None:
                payload = b""
            elif entry.code == Method.Evaluate:
                payload = evaluate_response(unpack_results(results)).SerializeToString()
            else:
                payload = pack_answer(time.monotonic(), results)
            self._complete(entry, payload, error)
            if error is None and ask is not None and ask.packed:
                self._permit(ask)

        try:
            if entry.code == Method.Evaluate:
                ask = evaluate_ask(_request(entry))
            else:
                ask = requests.Evaluate(*self._unpacker.unpack(entry.payload), entry.payload)
            call = self._service.begin_evaluate(self._session, ask, deadline, answer, began)
        except Exception as error:
            self._complete(entry, b"", error)
            return
        if not call.done():
            self._calls[number] = call

    def _permit(self, ask: requests.Evaluate) -> None:
        """Have the express carry ``ask``, which was answered, when it is asked again."""
        express, terms = self._service.express, ask.terms
        if express is None or terms.term == express.term:
            return
        terms.term = express.term
        with suppress(HillInferError):  # The context may be gone by now.
            permit = self._service.permit(self._session, ask)
            if permit is not None:
                express.permit(self._fds, permit)

    async def _serve(self, entry: Entry, deadline: float | None) -> None:
        try:
            if entry.code not in self._methods:
                raise InvalidInput(f"the ring has no method {entry.code}")
            message = await self._methods[entry.code](self._session, _request(entry), deadline)
            answer = message.SerializeToString()
        except Exception as error:
            self._complete(entry, b"", error)
            # The future that raised it keeps it, and its traceback this frame and so the ring's memory: a
            # cycle, and a descriptor that would go when garbage is next collected.
            error.__traceback__ = None
        else:
            self._complete(entry, answer, None)

    def _complete(self, entry: Entry, payload: bytes, error: Exception | None) -> None:
        if error is None and len(payload) > PAYLOAD_BYTES:
            error = InvalidInput("the answer does not fit in the ring; make this call by gRPC")
        if error is not None:
            payload = self._refusal(error)
        outcome = Outcome.answered if error is None else Outcome.refused
        try:
            self._completions.put(Entry(entry.ticket, outcome, 0, payload), self._fds.completed)
        except HillInferError as broken:
            self._break(broken)
        except BrokenPipeError:
            self._end()

    def _refusal(self, error: Exception) -> bytes:
        if isinstance(error, HillInferError):
            name, message = name_of(error), str(error)
            log.debug("call refused", error=name, reason=error)
        else:
            name, message = HillInferError.__name__, "internal error; see the daemon's log"
            log.exception("unexpected error in a call on a ring", error)
        self._service.count_refused(name)
        # A message may quote what the client sent; its end matters least.
        return attach_pb2.Refused(error=name, message=message[: PAYLOAD_BYTES // 8]).SerializeToString()

    def _break(self, error: HillInferError) -> None:
        log.warning("a client broke its ring", session=self._session.session_id, reason=error)
        self._end()

    def _end(self) -> None:
        self.stop()
        self.broken.set()


def _request(entry: Entry) -> Any:
    kind = _REQUESTS[entry.code]
    try:
        return kind.FromString(entry.payload)
    except DecodeError:
        raise InvalidInput(f"the payload is not a {kind.DESCRIPTOR.name}") from None


def _terms(request: Request) -> requests.Terms:
    evaluations = [
        requests.Evaluation(
            item.context_id,
            item.k,
            *(requests.RawRegion(*region, request.generation) for region in item[4:]),
        )
        for item in request.items
    ]
    return requests.Terms(request.query_heads, Reduction.from_proto(request.reduction), evaluations)
