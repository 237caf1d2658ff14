"""A session: one application attached to a daemon."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from hillinfer import apart, evaluation, wire
from hillinfer.ahead import Asked, Questions
from hillinfer.apart import Apart, ApartItem
from hillinfer.context import Context
from hillinfer.counters import Counters
from hillinfer.durable import DurableContext, check_names
from hillinfer.evaluation import Brought, EvaluateItem
from hillinfer.link import Link
from hillinfer.stream import EvaluateStream
from hillinfer.survival import RESTART_S, again, survives
from hillinfer.users import uid_of
from hillinfer_core import protocol
from hillinfer_core.errors import DaemonUnavailable, HillInferError, InvalidInput
from hillinfer_core.layout import Reduction, Shape
from hillinfer_core.v1 import cold_pool_pb2

__all__ = ["Brought", "Counters", "EvaluateItem", "Session"]

DEFAULT_ARENA_BYTES = 8 << 20


class Session:
    """An application's connection to a daemon; made by `connect`, ended by `close` or ``with``.

    All contexts of the session, and everything they hold, are freed when it
    ends, even by the death of the process; durable contexts alone stay.
    Thread-safe: one lock lets one call at a time through. Not usable in a forked child.

    Every call takes `timeout_s` seconds at most for each request it makes. It
    raises `DeadlineExceeded` when the daemon does not answer. After a call that
    reads or writes rows and that the daemon did not answer (out of time,
    interrupted), the daemon may still use the shared memory: from then on, unless the daemon is
    restarted, only `status` and closing work, anything else raises
    `DaemonUnavailable`. Errors that the daemon answers with end nothing.

    When the daemon is restarted, the call that notices waits `restart_s` seconds
    for the new one at most, attaches to it and goes on. Contexts are opened again whose
    rows are all in a durable context or with this process (`keep_bytes`); every use of any other raises
    `ContextLost`. Where no daemon comes back, calls raise `DaemonUnavailable`, and each
    later one tries again without waiting. A session that the daemon
    itself ended, as an administrator may have it do, stays ended.
    """

    def __init__(
        self,
        path: Path,
        arena_bytes: int,
        name: str,
        timeout_s: float,
        ring: bool,
        restart_s: float,
        keep_bytes: int,
    ) -> None:
        self.socket = path
        self.timeout_s = timeout_s
        self.counters = Counters()
        self.lock = threading.RLock()
        self.restart_s = restart_s
        self.keep_bytes = keep_bytes
        self._asked = arena_bytes, name
        self._with_ring = ring
        self._link: Link | None = self._attach(timeout_s)
        self._accepted = self._link.accepted
        self.arena_bytes = self._link.arena_bytes
        """Memory shared with the daemon; 0 in a session that can only ask for `status`."""
        self.restarts = 0
        """Restarts of the daemon that the session went through."""
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.questions = Questions(self.counters)
        """For the library's own use, under `lock`."""
        self._away_since = 0.0
        self._ended = ""

    @property
    def session_id(self) -> int:
        """The session's number in the daemon; another after a restart of the daemon."""
        return self._accepted.session_id

    @property
    def server_version(self) -> str:
        """Of the daemon."""
        return self._accepted.server_version

    @classmethod
    def connect(
        cls,
        socket: Path | None = None,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        name: str = "",
        timeout_s: float = 30.0,
        *,
        ring: bool = True,
        restart_s: float = RESTART_S,
        keep_bytes: int = 0,
    ) -> Self:
        """Attaches to the daemon at the attach socket `socket`, by default the one of this machine or user.

        `arena_bytes` is the memory shared with the daemon; larger transfers go
        in pieces, and 0 gives a session that can only ask for `status`. `name`
        shows in the daemon's status. Without `ring` every call goes by gRPC, which is slower.
        `restart_s` is how long a call waits for a daemon that is restarted; 0 for not at all.
        Of what is appended to a volatile context this process keeps a copy, of `keep_bytes` at
        most for each, with which it survives a restart of the daemon.
        Raises `DaemonUnavailable` when no daemon is there, or the error with which it refused.
        """
        path = Path(socket) if socket is not None else protocol.attach_socket(protocol.default_runtime_dir())
        return cls(path, arena_bytes, name, timeout_s, ring, restart_s, keep_bytes)

    @survives
    def open_context(
        self,
        shape: Shape,
        *,
        durable: str | None = None,
        base: str | None = None,
        owner: str | int | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Context:
        """Opens a context: an empty, volatile one without further arguments.

        `durable` is the name of a context that outlives the session, owned by
        this user: made new, or one not yet saved that nobody has open, to be
        continued; its `length` says from where, tails are lost that were not
        saved. It is written by one session and complete with `Context.save`.
        `base` is the name of a saved one: the context begins with all its
        tokens, which it shares with every other reader; what is appended is its
        own and volatile. `owner` is the user whose it is, by default this one;
        another's can be begun with by members of the group that it was saved for.
        `labels` say what a durable context was made from (at most 16, keys of at
        most 64 and values of at most 256 characters) and must be the same ones each time.

        Raises `InvalidInput` for a shape or name out of range, and when the
        arena is too small for one append unit of the shape; `ContextMismatch`
        when shape or labels differ from those of the name, naming what differs;
        `ContextInUse` when another session writes it or, for `durable`, it is
        saved; `UnknownContext` when there is none to begin with.
        """
        shape.validate()
        check_names(durable, base, labels)
        needed = shape.kv_heads * shape.append_unit * (shape.row_bytes + np.uint32().itemsize)
        with self.lock:
            if self.staging().nbytes < needed:
                raise InvalidInput(
                    f"the session's arena of {self.staging().nbytes} bytes is too small for {shape}: "
                    f"connect with arena_bytes of {needed} or more"
                )
            request = cold_pool_pb2.OpenContextRequest(
                layers=shape.layers,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                dtype=wire.number(shape.dtype),
                precision=wire.number(shape.precision),
                durable_name=durable,
                base_name=base,
                base_uid=None if base is None or owner is None else uid_of(owner),
                labels=labels,
            )
            response = self.call("OpenContext", request)
            context = Context(self, shape, request, response)
            try:
                context.load_tails(response.tail_tokens)
            except BaseException:
                with suppress(HillInferError):
                    context.close()
                raise
            self._contexts.add(context)
        return context

    @survives
    def list_contexts(self) -> list[DurableContext]:
        """The durable contexts that this user may begin with (all for root), by name, then uid."""
        response = self.call("ListContexts", cold_pool_pb2.ListContextsRequest())
        return [DurableContext.from_proto(listed) for listed in response.contexts]

    def find_context(self, name: str, owner: str | int | None = None) -> DurableContext | None:
        """The durable context of that name, of this user or of `owner`; None when there is none to read."""
        uid = os.getuid() if owner is None else uid_of(owner)
        return next((each for each in self.list_contexts() if (each.name, each.uid) == (name, uid)), None)

    @survives
    def delete_context(self, name: str, uid: int | None = None) -> int:
        """Deletes a durable context, of this user unless `uid` says otherwise; returns the bytes freed.

        Raises `UnknownContext`, `ContextInUse`, and `NotAllowed` for another
        user's unless this is root.
        """
        request = cold_pool_pb2.DeleteContextRequest(name=name, uid=os.getuid() if uid is None else uid)
        return int(self.call("DeleteContext", request).freed_bytes)

    @survives
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
        with self.lock:
            brought = self._evaluate(layer, items, reduction, bring=True)
            evaluation.bring_left_behind(layer, items, brought)
            return brought

    @survives
    def ask_ahead(self, layer: int, items: Sequence[EvaluateItem]) -> Asked | None:
        """Begins what `evaluate_and_bring` does and does not wait for it: `collect` brings what comes of it.

        Two such evaluations are under way at a time if each has room in half of the shared memory, else one.
        A further one first waits for the answer of the oldest, and keeps it; whatever else uses the shared
        memory waits for all of them (`waited_s`). None, and nothing begun, without a ring and where one
        request does not do.
        """
        with self.lock:
            evaluation.check_kept(items)
            return self.questions.send(self.attached(), layer, items, self.timeout_s)

    @survives
    def collect(self, asked: Asked) -> list[Brought]:
        """Waits for what `ask_ahead` began and returns what `evaluate_and_bring` would; raises as that does.

        What was lost with a daemon is asked again, of the one that the session goes on with.
        """
        with self.lock:
            self.settle(asked)
            if asked.error is not None:
                raise asked.error
            if asked.brought is None:
                asked.brought = self._evaluate(asked.layer, asked.items, Reduction.sum, bring=True)
            evaluation.bring_left_behind(asked.layer, asked.items, asked.brought)
            return asked.brought

    @property
    def waited_s(self) -> float:
        """Seconds in which calls waited for answers to what was asked ahead, to use the shared memory."""
        return self.questions.waited_s

    def settle(self, asked: Asked) -> None:
        """Waits until the daemon is done with what `ask_ahead` began, whatever came of it."""
        with self.lock:
            if asked.under_way is not None:
                self.questions.settle(self.attached(), asked)

    @survives
    def rank(
        self,
        layer: int,
        items: Sequence[EvaluateItem],
        reduction: Reduction = Reduction.sum,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Brought]:
        """As `evaluate_and_bring`, but with the winners' `Brought.scores` and without rows.

        All winners are counted as missing that are not held. `meanwhile` is called in this thread once the
        drive was asked, again if another daemon has to be, and must not raise or use the session.
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
        with self.lock:
            evaluation.check_kept(items)
            link, timeout_s = self.attached(), self.timeout_s
            return self.questions.ask(
                link, layer, items, reduction, timeout_s, bring=bring, meanwhile=meanwhile
            )

    @survives
    def rank_apart(self, layer: int, items: Sequence[ApartItem]) -> list[Apart]:
        """Ranks tokens of one layer for each query head apart: what bounds the mass of tokens not fetched.

        One turn of the stream, as a rule; items that the arena has no room for
        are asked in turns of their own. Reads the layer's rows once, at the
        first such call, if keys lie outside their ranges. Raises
        `InvalidInput` for wrong shapes or a query that is not finite.
        """
        with self.lock:
            evaluation.check_kept(items)
            return apart.rank(self, layer, items)

    @survives
    def status(self) -> cold_pool_pb2.StatusResponse:
        """The daemon's status; sizes in bytes."""
        response: cold_pool_pb2.StatusResponse = self.call("Status", cold_pool_pb2.StatusRequest())
        return response

    def close(self) -> None:
        """Ends the session; the daemon frees everything of it. Harmless when called again."""
        with self.lock:
            self._ended = "the session is closed; connect a new one"
            self._drop_link()

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
        link = self.attached()
        self.questions.settle_all(link)
        return link.staging()

    def call(self, method: str, request: Any) -> Any:
        """For the library's own use: a call with deadline and typed errors, by the ring where it takes it."""
        with self.lock:
            return self.attached().call(method, request, self.timeout_s)

    def ask(self, request: cold_pool_pb2.EvaluateRequest) -> cold_pool_pb2.EvaluateResponse:
        """For the library's own use, under `lock`: an evaluation, counted."""
        response = self.attached().ask(request, self.timeout_s)
        self.questions.count(response.results)
        return response

    def new_stream(self) -> EvaluateStream:
        """For the library's own use: another evaluation stream of this session, not counted, not locked."""
        return self.attached().new_stream(self.timeout_s)

    def note_gone(self) -> None:
        """For the library's own use, under `lock`: the daemon is gone; the next use waits for another."""
        self._drop_link()
        self._away_since = time.monotonic()
        for context in list(self._contexts):
            context.note_gone()

    def forget(self, context: Context) -> bool:
        """For the library's own use, under `lock`: a context closes; says whether a daemon holds it."""
        self._contexts.discard(context)
        return self._link is not None or bool(self._ended)

    def _attach(self, timeout_s: float) -> Link:
        arena_bytes, name = self._asked
        return Link(self.socket, arena_bytes, name, timeout_s, self._with_ring, self.restart_s)

    def attached(self) -> Link:
        """For the library's own use, under `lock`: the attachment; another if the daemon was restarted."""
        if self._link is None and not self._ended:
            again(self._reattach, self._away_since, self.restart_s)
        if self._link is None:
            raise DaemonUnavailable(self._ended)
        return self._link

    def _reattach(self, attach_s: float) -> None:
        """Attach to another daemon and have every context opened again that can be; all of it, or nothing."""
        try:
            link = self._attach(attach_s)
            if link.accepted.instance == self._accepted.instance:
                link.close()
                self._ended = (
                    "the daemon ended this session and goes on itself (hillinferctl close does that): "
                    "connect a new session"
                )
                return
            self._link = link
            for context in list(self._contexts):
                context.restore()
        except BaseException:
            self._drop_link()
            raise
        # Last: the attempt after one that failed half-way must not take this daemon for the one it had.
        self._accepted = link.accepted
        self.restarts += 1

    def _drop_link(self) -> None:
        self.questions.lose()
        if self._link is not None:
            link, self._link = self._link, None
            link.close()
