"""One attachment to a daemon: its connection, arena, channel and ring. After a restart there is another."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import grpc

from hillinfer import wire
from hillinfer.evaluation import EvaluateItem, Plan
from hillinfer.ring import RingTransport, Submitted
from hillinfer.stream import EvaluateStream
from hillinfer.survival import DaemonGone
from hillinfer_core import errors, protocol
from hillinfer_core.errors import DaemonUnavailable, ForeignToken, HillInferError, InvalidInput
from hillinfer_core.packed import Answer, Evaluated, unpack_answer
from hillinfer_core.ring import PAYLOAD_BYTES, Method, Outcome
from hillinfer_core.v1 import attach_pb2, cold_pool_pb2, cold_pool_pb2_grpc

_ON_RING: dict[str, Any] = {
    "Append": cold_pool_pb2.AppendResponse,
    "Evaluate": cold_pool_pb2.EvaluateResponse,
    "Fetch": cold_pool_pb2.FetchResponse,
}

_WITHOUT_ARENA = ("OpenContext", "CloseContext", "SaveContext", "ListContexts", "DeleteContext", "Status")

_HANG_UP_S = 1.0
"""How long a connection may seem open after the daemon's end was noticed elsewhere. Our choice."""


class Link:
    """Attaches on construction, see `wire.attach`. Not thread-safe: the session's lock covers every call.

    `stopping_s`: how long a daemon that says it is stopping may take to hang up.
    """

    def __init__(
        self, path: Path, arena_bytes: int, name: str, attach_s: float, ring: bool, stopping_s: float
    ) -> None:
        self._connection, self.accepted, arena, fds = wire.attach(path, arena_bytes, name, attach_s, ring)
        self._stopping_s = stopping_s
        self.arena_bytes = 0 if arena is None else arena.nbytes
        self._staging = None if arena is None else wire.Staging(arena, self.accepted.arena_generation)
        self._parts = () if self._staging is None else self._staging.divided()
        self._metadata = ((protocol.TOKEN_KEY, self.accepted.token),)
        # Own subchannels: another session's backoff after a dead daemon must not delay this one.
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
        self._channel = grpc.insecure_channel(self.accepted.grpc_address, options)
        self._stub = cold_pool_pb2_grpc.ColdPoolStub(self._channel)  # type: ignore[no-untyped-call]
        self._stream: EvaluateStream | None = None
        self._ring = None if fds is None else RingTransport(fds, self._connection)
        self._unfinished = 0  # calls that may use the arena and were not answered (yet)

    def staging(self, part: int | None = None, under_way: int = 0) -> wire.Staging:
        """Return the allocator of the arena, or of one `part`: 0 and 1, as large, and 2, which is small.

        under_way: calls that were sent and not yet answered, in other parts. Raises `DaemonUnavailable` when
        the daemon may use the arena for anything else, `DaemonGone` if it is gone.
        """
        if self._staging is None:
            raise InvalidInput("the session has no arena; connect with arena_bytes above 0")
        if self._unfinished != under_way:
            if self._hung_up(0):
                raise DaemonGone("the daemon ended the session")
            raise DaemonUnavailable(
                "a call did not finish, the shared memory may still be in use; connect a new session"
            )
        return self._staging if part is None else self._parts[part]

    def call(self, method: str, request: Any, timeout_s: float) -> Any:
        """Make a call with deadline and typed errors, by the ring where it takes it."""
        if method in _ON_RING and self._ring is not None and self._ring.takes(request):
            return self._ask_ring(method, request, timeout_s)
        with self._awaiting(method):
            return getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._metadata)

    def ask(self, request: cold_pool_pb2.EvaluateRequest, timeout_s: float) -> cold_pool_pb2.EvaluateResponse:
        """Make an evaluation: by the ring, or on a stream of its own."""
        if self._ring is not None and self._ring.takes(request):
            response: cold_pool_pb2.EvaluateResponse = self._ask_ring("Evaluate", request, timeout_s)
            return response
        return self._ask_stream(request, timeout_s, None)

    def evaluate(
        self,
        plan: Plan,
        layer: int,
        items: Sequence[EvaluateItem],
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> Answer:
        """Make the evaluation of `plan`, which is filled, as `ask` does; do `meanwhile` once it is sent."""
        submitted = self.submit(plan, layer, items, timeout_s)
        if submitted is not None:
            if meanwhile is not None:
                meanwhile()
            return self.answer(submitted)
        response = self._ask_stream(plan.message(layer, items), timeout_s, meanwhile)
        results = [
            Evaluated(
                result.generation,
                list(result.missing_per_head),
                result.rows_brought,
                result.evaluated_bytes,
                result.read_bytes,
                result.scan_s,
            )
            for result in response.results
        ]
        return Answer(response.answered_at, results)

    def submit(
        self, plan: Plan, layer: int, items: Sequence[EvaluateItem], timeout_s: float
    ) -> Submitted | None:
        """Send the evaluation of `plan`, which is filled, and do not wait for its `answer`.

        Until then the daemon may use its part of the arena. None for one that the ring does not take: it is
        not sent.
        """
        packed = b"" if self._ring is None else plan.packed(layer, items)
        if self._ring is None or len(packed) > PAYLOAD_BYTES:
            return None
        return self._submit(Method.EvaluatePacked, packed, timeout_s)

    def answer(self, submitted: Submitted) -> Answer:
        """Wait for the answer of an evaluation that was sent, until its deadline at most."""
        return unpack_answer(self._answer(submitted))

    def submit_append(self, request: cold_pool_pb2.AppendRequest, timeout_s: float) -> Submitted | None:
        """As `submit`, of an append."""
        if self._ring is None or not self._ring.takes(request):
            return None
        return self._submit(Method.Append, request.SerializeToString(), timeout_s)

    def answer_append(self, submitted: Submitted) -> cold_pool_pb2.AppendResponse:
        """As `answer`, of an append."""
        return cold_pool_pb2.AppendResponse.FromString(self._answer(submitted))

    def _ask_stream(
        self,
        request: cold_pool_pb2.EvaluateRequest,
        timeout_s: float,
        meanwhile: Callable[[], None] | None,
    ) -> cold_pool_pb2.EvaluateResponse:
        if self._stream is None:
            self._stream = self.new_stream(timeout_s)
        with self._awaiting("Evaluate"):
            return self._stream.ask(request, meanwhile)

    def new_stream(self, timeout_s: float) -> EvaluateStream:
        """Return another evaluation stream of this attachment."""
        return EvaluateStream(self._stub, self._metadata, timeout_s)

    def close(self) -> None:
        """End the attachment; the daemon frees everything of it."""
        if self._stream is not None:
            self._stream.close()
        self._channel.close()
        if self._ring is not None:
            self._ring.close()
        self._connection.close()
        self._staging, self._parts = None, ()

    def _ask_ring(self, method: str, request: Any, timeout_s: float) -> Any:
        submitted = self._submit(Method[method], request.SerializeToString(), timeout_s)
        return _ON_RING[method].FromString(self._answer(submitted))

    def _submit(self, method: Method, payload: bytes, timeout_s: float) -> Submitted:
        assert self._ring is not None
        # Counted first and taken back by an answer, so that an interruption at any point leaves it counted.
        self._unfinished += 1
        return self._ring.submit(method, payload, timeout_s)

    def _answer(self, submitted: Submitted) -> bytes:
        """Wait for the answer of what was submitted; raise the error that came, or that none did."""
        assert self._ring is not None
        try:
            answer = self._ring.answer(submitted)
        except DaemonUnavailable as error:
            self._raise(error, stopping=False)
        self._unfinished -= 1
        if answer.code == Outcome.refused:
            refused = attach_pb2.Refused.FromString(answer.payload)
            typed = errors.by_name(refused.error)(refused.message)
            self._raise(typed, stopping=isinstance(typed, DaemonUnavailable))
        return answer.payload

    @contextmanager
    def _awaiting(self, method: str) -> Iterator[None]:
        """Note for `staging` whether the gRPC call inside ended with an answer, and type its error."""
        uses_arena = method not in _WITHOUT_ARENA
        # As in `_submit`.
        self._unfinished += uses_arena
        try:
            yield
        except grpc.RpcError as error:
            if wire.answered(error):
                self._unfinished -= uses_arena
            typed = wire.typed_error(error, method)
            self._raise(typed, stopping=isinstance(typed, DaemonUnavailable))
        except DaemonUnavailable as error:
            self._raise(error, stopping=False)
        self._unfinished -= uses_arena

    def _raise(self, error: HillInferError, *, stopping: bool) -> NoReturn:
        """Raise the error of a call, or `DaemonGone` if it is one of a daemon that has."""
        # A refusal with DaemonUnavailable, or a call broken off, means that it is about to stop, if not gone.
        patience = max(self._stopping_s, _HANG_UP_S) if stopping else _HANG_UP_S
        if isinstance(error, (DaemonUnavailable, ForeignToken)) and self._hung_up(patience):
            raise DaemonGone(str(error)) from None
        raise error from None

    def _hung_up(self, within_s: float) -> bool:
        # The daemon sends nothing more on it: an event is its end.
        waiting = select.poll()
        waiting.register(self._connection, select.POLLIN)
        return bool(waiting.poll(within_s * 1000))
