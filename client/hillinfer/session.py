"""A session: one application attached to a daemon."""

from __future__ import annotations

import os
import socket as sockets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from hillinfer import apart, evaluation, wire
from hillinfer.apart import Apart, ApartItem
from hillinfer.context import Context
from hillinfer.durable import DurableContext
from hillinfer.evaluation import Brought, EvaluateItem
from hillinfer.ring import RingTransport
from hillinfer.stream import EvaluateStream
from hillinfer_core import errors, protocol
from hillinfer_core.arena import Arena
from hillinfer_core.errors import DaemonUnavailable, HillInferError, InvalidInput
from hillinfer_core.layout import Reduction, Shape
from hillinfer_core.ring import Method, Outcome, RingFds
from hillinfer_core.v1 import attach_pb2, cold_pool_pb2, cold_pool_pb2_grpc

__all__ = ["Brought", "Counters", "EvaluateItem", "Session"]

DEFAULT_ARENA_BYTES = 8 << 20

_ON_RING: dict[str, Any] = {
    "Append": cold_pool_pb2.AppendResponse,
    "Evaluate": cold_pool_pb2.EvaluateResponse,
    "Fetch": cold_pool_pb2.FetchResponse,
}

_WITHOUT_ARENA = ("OpenContext", "CloseContext", "SaveContext", "ListContexts", "DeleteContext", "Status")


@dataclass
class Counters:
    """Bytes moved and scanned for a session since it connected."""

    written_bytes: int = 0
    """Rows appended to the cold pool."""
    read_bytes: int = 0
    """Read from the cold pool, whole pages where it reads whole pages."""
    evaluated_bytes: int = 0
    """Evaluation keys scanned."""


class Session:
    """An application's connection to a daemon; made by `connect`, ended by `close` or ``with``.

    All contexts of the session, and everything they hold, are freed when it
    ends, even by the death of the process; durable contexts alone stay.
    Thread-safe: one lock lets one call at a time through. Not usable in a forked child.

    Every call takes `timeout_s` seconds at most for each request it makes. It
    raises `DaemonUnavailable` when the daemon is gone and `DeadlineExceeded`
    when it does not answer. After a call that reads or writes rows and that the
    daemon did not answer (out of time, interrupted), the daemon may still use
    the shared memory: from then on only `status` and closing work, anything else
    raises `DaemonUnavailable`. Errors that the daemon answers with end nothing.
    """

    def __init__(
        self,
        path: Path,
        connection: sockets.socket,
        accepted: attach_pb2.Accepted,
        arena: Arena | None,
        ring: RingFds | None,
        timeout_s: float,
    ) -> None:
        self.socket = path
        self.timeout_s = timeout_s
        self.session_id = accepted.session_id
        self.server_version = accepted.server_version
        self.arena_bytes = 0 if arena is None else arena.nbytes
        """Memory shared with the daemon; 0 in a session that can only ask for `status`."""
        self.counters = Counters()
        self.lock = threading.RLock()
        self._connection = connection
        self._staging = None if arena is None else wire.Staging(arena, accepted.arena_generation)
        self._metadata = ((protocol.TOKEN_KEY, accepted.token),)
        # Own subchannels: another session's backoff after a dead daemon must not delay this one.
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
        self._channel = grpc.insecure_channel(accepted.grpc_address, options)
        self._stub = cold_pool_pb2_grpc.ColdPoolStub(self._channel)  # type: ignore[no-untyped-call]
        self._stream = EvaluateStream(self._stub, self._metadata, timeout_s)
        self._ring = None if ring is None else RingTransport(ring, connection)
        self._plan: evaluation.Plan | None = None
        self._unfinished = False
        self._closed = False

    @classmethod
    def connect(
        cls,
        socket: Path | None = None,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        name: str = "",
        timeout_s: float = 30.0,
        *,
        ring: bool = True,
    ) -> Self:
        """Attaches to the daemon at the attach socket `socket`, by default the one of this machine or user.

        `arena_bytes` is the memory shared with the daemon; larger transfers go
        in pieces, and 0 gives a session that can only ask for `status`. `name`
        shows in the daemon's status. Without `ring` every call goes by gRPC, which is slower.
        Raises `DaemonUnavailable` when no daemon is there, or the error with which it refused.
        """
        path = Path(socket) if socket is not None else protocol.attach_socket(protocol.default_runtime_dir())
        connection, accepted, arena, fds = wire.attach(path, arena_bytes, name, timeout_s, ring)
        return cls(path, connection, accepted, arena, fds, timeout_s)

    def open_context(
        self,
        shape: Shape,
        *,
        durable: str | None = None,
        base: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Context:
        """Opens a context: an empty, volatile one without further arguments.

        `durable` is the name of a context that outlives the session, owned by
        this user: made new, or one not yet saved that nobody has open, to be
        continued; its `length` says from where, tails are lost that were not
        saved. It is written by one session and complete with `Context.save`.
        `base` is the name of a saved one: the context begins with all its
        tokens, which it shares with every other reader; what is appended is its
        own and volatile. `labels` say what a durable context was made from (at
        most 16, keys of at most 64 and values of at most 256 characters) and
        must be the same ones each time.

        Raises `InvalidInput` for a shape or name out of range, and when the
        arena is too small for one append unit of the shape; `ContextMismatch`
        when shape or labels differ from those of the name, naming what differs;
        `ContextInUse` when another session writes it or, for `durable`, it is
        saved; `UnknownContext` when there is none to begin with.
        """
        shape.validate()
        if durable is not None and base is not None:
            raise InvalidInput("a context is durable or has a base, not both")
        if "" in (durable, base):
            raise InvalidInput("the name of a context cannot be empty")
        if labels and durable is None and base is None:
            raise InvalidInput("labels are for contexts with a name: give durable or base")
        needed = shape.kv_heads * shape.append_unit * (shape.row_bytes + np.uint32().itemsize)
        with self.lock:
            if self.staging().nbytes < needed:
                raise InvalidInput(
                    f"the session's arena of {self.staging().nbytes} bytes is too small for {shape}: "
                    f"connect with arena_bytes of {needed} or more"
                )
            response = self.call(
                "OpenContext",
                cold_pool_pb2.OpenContextRequest(
                    layers=shape.layers,
                    kv_heads=shape.kv_heads,
                    head_dim=shape.head_dim,
                    dtype=wire.number(shape.dtype),
                    precision=wire.number(shape.precision),
                    durable_name=durable,
                    base_name=base,
                    labels=labels,
                ),
            )
            context = Context(self, shape, response, durable)
            try:
                context.load_tails(response.tail_tokens)
            except BaseException:
                with suppress(HillInferError):
                    context.close()
                raise
        return context

    def list_contexts(self) -> list[DurableContext]:
        """The durable contexts of this user (of all users for root), by name, then uid."""
        response = self.call("ListContexts", cold_pool_pb2.ListContextsRequest())
        return [DurableContext.from_proto(listed) for listed in response.contexts]

    def find_context(self, name: str) -> DurableContext | None:
        """This user's durable context of that name, None when there is none."""
        mine = (each for each in self.list_contexts() if (each.name, each.uid) == (name, os.getuid()))
        return next(mine, None)

    def delete_context(self, name: str, uid: int | None = None) -> int:
        """Deletes a durable context, of this user unless `uid` says otherwise; returns the bytes freed.

        Raises `UnknownContext`, `ContextInUse`, and `NotAllowed` for another
        user's unless this is root.
        """
        request = cold_pool_pb2.DeleteContextRequest(name=name, uid=os.getuid() if uid is None else uid)
        return int(self.call("DeleteContext", request).freed_bytes)

    def evaluate_and_bring(
        self, layer: int, items: Sequence[EvaluateItem], reduction: Reduction = Reduction.sum
    ) -> list[Brought]:
        """Ranks tokens of one layer in each item's context and brings the winners' rows that are not held.

        One turn of the stream, as a rule. Rows that the arena has no room for
        are fetched after it, and items that it has no room for are asked in
        turns of their own. The arrays returned are copies. Raises `InvalidInput`
        for wrong shapes or a query that is not finite, `CorruptData` for a row
        that does not match its checksum.
        """
        brought = self._evaluate(layer, items, reduction, bring=True)
        with self.lock:
            for item, answer in zip(items, brought, strict=True):
                if len(answer.rows) < sum(answer.missing_per_head):
                    self._complete(layer, item, answer)
        return brought

    def rank(
        self,
        layer: int,
        items: Sequence[EvaluateItem],
        reduction: Reduction = Reduction.sum,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Brought]:
        """As `evaluate_and_bring`, but with the winners' `Brought.scores` and without rows.

        All winners are counted as missing that are not held. `meanwhile` is called in this thread once the
        drive was asked, and must not raise or use the session.
        """
        return self._evaluate(layer, items, reduction, bring=False, meanwhile=meanwhile)

    def _evaluate(
        self,
        layer: int,
        items: Sequence[EvaluateItem],
        reduction: Reduction,
        bring: bool,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Brought]:
        if not items:
            if meanwhile is not None:
                meanwhile()
            return []
        with self.lock:
            staging, shapes = self.staging(), evaluation.shapes_of(items, reduction, bring)
            plan = self._plan
            if plan is None or plan.shapes != shapes:
                try:
                    plan = evaluation.Plan(staging, items, reduction, shapes, bring)
                except wire.ArenaTooSmall:
                    if len(items) == 1:
                        raise
                    half = len(items) // 2
                    return self._evaluate(layer, items[:half], reduction, bring, meanwhile) + self._evaluate(
                        layer, items[half:], reduction, bring
                    )
                self._plan = plan
            answer = self.ask(plan.fill(layer, items), meanwhile)
            return [
                Brought(
                    buffers.ids.copy(),
                    list(result.missing_per_head),
                    buffers.rows[: result.rows_brought].copy(),
                    result.generation,
                    result.evaluated_bytes,
                    result.read_bytes,
                    None if bring else buffers.scores.copy(),
                    result.scan_s,
                    answer.answered_at,
                )
                for buffers, result in zip(plan.buffers, answer.results, strict=True)
            ]

    def rank_apart(self, layer: int, items: Sequence[ApartItem]) -> list[Apart]:
        """Ranks tokens of one layer for each query head apart: what bounds the mass of tokens not fetched.

        One turn of the stream, as a rule; items that the arena has no room for
        are asked in turns of their own. Reads the layer's rows once, at the
        first such call, if keys lie outside their ranges. Raises
        `InvalidInput` for wrong shapes or a query that is not finite.
        """
        if not items:
            return []
        with self.lock:
            try:
                request, answers = apart.stage(self.staging(), layer, items)
            except wire.ArenaTooSmall:
                if len(items) == 1:
                    raise
                half = len(items) // 2
                return self.rank_apart(layer, items[:half]) + self.rank_apart(layer, items[half:])
            self.ask(request)
            return [apart.taken(answer) for answer in answers]

    def _complete(self, layer: int, item: EvaluateItem, answer: Brought) -> None:
        before = self.counters.read_bytes
        left = evaluation.rows_left_behind(item, answer.ids, len(answer.rows))
        answer.rows = np.concatenate([answer.rows, item.context.fetch_rows(layer, left)])
        answer.read_bytes += self.counters.read_bytes - before

    def status(self) -> cold_pool_pb2.StatusResponse:
        """The daemon's status; sizes in bytes."""
        response: cold_pool_pb2.StatusResponse = self.call("Status", cold_pool_pb2.StatusRequest())
        return response

    def close(self) -> None:
        """Ends the session; the daemon frees everything of it. Harmless when called again."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            self._stream.close()
            self._channel.close()
            if self._ring is not None:
                self._ring.close()
            self._connection.close()
            self._staging = self._plan = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def staging(self) -> wire.Staging:
        """For the library's own use, under `lock`: the arena's allocator.

        Whoever is about to touch the arena asks for it anew: it raises
        `DaemonUnavailable` when the daemon may still use the arena.
        """
        if self._staging is None:
            raise self._no_arena()
        if self._unfinished:
            raise DaemonUnavailable(
                "a call did not finish, the shared memory may still be in use; connect a new session"
            )
        return self._staging

    def call(self, method: str, request: Any) -> Any:
        """For the library's own use: a call with deadline and typed errors, by the ring where it takes it."""
        with self.lock:
            if self._closed:
                raise self._no_arena()
            if method in _ON_RING and self._ring is not None and self._ring.takes(request):
                return self._ask_ring(method, request)
            with self._awaiting(method):
                return getattr(self._stub, method)(request, timeout=self.timeout_s, metadata=self._metadata)

    def ask(
        self, request: cold_pool_pb2.EvaluateRequest, meanwhile: Callable[[], None] | None = None
    ) -> cold_pool_pb2.EvaluateResponse:
        """For the library's own use, under `lock`: an evaluation, counted."""
        if self._closed:
            raise self._no_arena()
        if self._ring is not None and self._ring.takes(request):
            response: cold_pool_pb2.EvaluateResponse = self._ask_ring("Evaluate", request, meanwhile)
        else:
            with self._awaiting("Evaluate"):
                response = self._stream.ask(request, meanwhile)
        for result in response.results:
            self.counters.evaluated_bytes += result.evaluated_bytes
            self.counters.read_bytes += result.read_bytes
        return response

    def new_stream(self) -> EvaluateStream:
        """For the library's own use: another evaluation stream of this session, not counted, not locked."""
        return EvaluateStream(self._stub, self._metadata, self.timeout_s)

    def _ask_ring(self, method: str, request: Any, meanwhile: Callable[[], None] | None = None) -> Any:
        assert self._ring is not None
        with self._awaiting(method):
            answer = self._ring.ask(Method[method], request, self.timeout_s, meanwhile)
        if answer.code == Outcome.refused:
            refused = attach_pb2.Refused.FromString(answer.payload)
            raise errors.by_name(refused.error)(refused.message)
        return _ON_RING[method].FromString(answer.payload)

    @contextmanager
    def _awaiting(self, method: str) -> Iterator[None]:
        """Notes for `staging` whether the call inside ended with an answer, and types its error."""
        before = self._unfinished
        # Set first and taken back by an answer, so that an interruption at any point leaves it set.
        self._unfinished = before or method not in _WITHOUT_ARENA
        try:
            yield
        except grpc.RpcError as error:
            if wire.answered(error):
                self._unfinished = before
            raise wire.typed_error(error, method) from None
        self._unfinished = before

    def _no_arena(self) -> DaemonUnavailable | InvalidInput:
        if self._closed:
            return DaemonUnavailable("the session is closed; connect a new one")
        return InvalidInput("the session has no arena; connect with arena_bytes above 0")
