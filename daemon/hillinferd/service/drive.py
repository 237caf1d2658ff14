"""One drive: its worker, its queue, its contexts, and what of them outlives the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hillinfer_core.errors import (
    DamagedCatalogue,
    DeviceUnavailable,
    HillInferError,
    InvalidInput,
)

from ..cec.loader import Status
from ..domain.contexts import Catalogue, Context, Quotas
from ..domain.extents import GRANULE, Extent, ExtentAllocator
from ..driver.settings import DriverSettings
from ..logs import get_logger
from ..worker import messages
from . import admission, pieces, requests
from .context_work import ContextWork
from .durable_store import DurableStore
from .evaluations import Evaluations
from .express import Run
from .preparing import discard_free, tell_of_arenas
from .sessions import Session, Sessions
from .supervisor import Supervisor
from .usage import Usage
from .work_queue import Piece, Priority, WorkQueue

log = get_logger(__name__)

T = TypeVar("T")

HEARTBEAT_S = 10.0
"""Longest between two questions whether an idle drive still answers. Our choice."""

REQUEST_TIMEOUT_S = 60.0
"""Longest a request may take before the worker counts as hung; real ones take at most seconds. Our choice."""

_CHANGE_NOTHING = ("evaluate", "fetch", "health")
"""Operations after which what was checked of an evaluation is so still."""


@dataclass(frozen=True)
class DriveSettings:
    """A drive's name, how its driver is opened, its catalogue file (None: no durable contexts), its patience.

    ``request_timeout_s`` is what one request may take; an idle drive is asked as often, but for
    :data:`HEARTBEAT_S`, whether it still answers.
    """

    name: str
    driver: DriverSettings
    catalogue: Path | None
    request_timeout_s: float = REQUEST_TIMEOUT_S


class Drive:
    """Serves the contexts of one drive. All methods belong to one event loop.

    Work waits in one :class:`WorkQueue` and is carried out one piece at a time, so that the books
    (:class:`Catalogue`) are changed by one piece of work at a time too.
    """

    def __init__(self, settings: DriveSettings, sessions: Sessions, quotas: Quotas, log_level: str) -> None:
        self.name = settings.name
        self.settings = settings
        self.usage = Usage()
        self.observer: Callable[[Piece, messages.Traffic], None] | None = None
        self.run_observer: Callable[[Run], None] | None = None
        self.changed: Callable[[], None] = lambda: None
        """Called when something changes that the checks of an evaluation depend on."""
        self.queue = WorkQueue(self._account)
        self.evaluations = Evaluations(self)
        self.worker = Supervisor(
            settings.name,
            settings.driver,
            log_level,
            request_timeout_s=settings.request_timeout_s,
            on_start=self._worker_starts,
            on_ready=self._worker_ready,
            on_death=self._worker_died,
        )
        path, pool = settings.catalogue, Path(settings.driver.path)
        self._durables = DurableStore(path, pool) if path else None
        self._quotas = quotas
        self._sessions = sessions
        self._contexts = self._empty(0)
        self.key_bytes = 0
        self._pool_id = ""
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def catalogue(self) -> Catalogue:
        """The books of the drive's contexts and extents."""
        return self._contexts.catalogue

    @property
    def known(self) -> bool:
        """Whether the drive was open once, so that the contexts on it are known."""
        return bool(self._pool_id)

    async def start(self) -> None:
        """Recover what the pool holds and start the worker; raises what keeps the drive from serving."""
        await self.worker.start()

    def serve(self) -> None:
        """Carry out work, and keep the worker alive; if :meth:`start` failed, try that again and again."""
        self._tasks = [
            asyncio.create_task(task) for task in (self.queue.run(), self.worker.watch(), self._heartbeat())
        ]

    async def stop(self) -> None:
        """Fail what waits, stop the worker, close the catalogue file."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.queue.cancel_all(DeviceUnavailable("the daemon is stopping"))
        await self.worker.stop()
        if self._durables is not None:
            await self._durables.close()

    def apply(self, quotas: Quotas) -> None:
        """Hold what is opened and appended from now on to ``quotas``."""
        self._quotas = quotas
        self.catalogue.quotas = quotas

    @property
    def supervised(self) -> bool:
        """Whether everything that :meth:`serve` began still goes on."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    def gone(self, reason: str) -> None:
        """Put the worker down: the drive was removed. What waits fails, volatile contexts are lost."""
        log.error("drive is gone", drive=self.name, reason=reason)
        self.worker.take_away(reason)

    def back(self, path: str) -> None:
        """Start a worker at once, unless there is one: the drive is there, its pool is ``path``."""
        self.worker.bring_back(path)

    async def attach(self, session: Session) -> None:
        """Tell the worker of a session's arena."""
        request = messages.AttachArena(session.session_id, session.arena.nbytes)
        await self.queue.submit_urgent(
            lambda: self.worker.call(request, session.arena_fd), operation="attach"
        )

    async def detach(self, session: Session) -> None:
        """Free what a session holds on this drive; work of it that is already running ends first."""
        for context in self.catalogue.of_session(session.session_id):
            # One at a time, as there may be thousands. What fails here, with the worker, is freed after it.
            with suppress(HillInferError):
                await self._close(session, context, None)
        await self.queue.submit_urgent(lambda: self._contexts.free(session), operation="detach")

    async def open_context(
        self, session: Session, ask: requests.OpenContext, deadline: float | None
    ) -> Context:
        """Open a context; see ``OpenContextRequest`` in cold_pool.proto."""
        return await self.queue.submit(
            session, lambda: self._contexts.open(session, ask), deadline, operation="open"
        )

    async def close_context(self, session: Session, context_id: int, deadline: float | None) -> None:
        """Close a context, also a lost one, and free what is its own."""
        await self._close(session, self.catalogue.find(session.session_id, context_id), deadline)

    async def _close(self, session: Session, context: Context, deadline: float | None) -> None:
        await self._discard_in_pieces(session, context, deadline)

        async def work() -> None:
            if self.catalogue.find(session.session_id, context.context_id) is context:
                await self._contexts.close(context)

        await self._bulk("close", session, work, deadline)

    async def _discard_in_pieces(self, session: Session, context: Context, deadline: float | None) -> None:
        """Discard what a large context has before it is closed, so that others need not wait for all of it.

        Whatever ends this before its end, closing discards everything.
        """
        if context.durable or sum(each.length for each in context.own_extents) <= pieces.DISCARD_BYTES:
            return
        for extent in await self._bulk("close", session, lambda: self._contexts.give_up(context), deadline):

            async def work(extent: Extent = extent) -> None:
                # Once it is closed, its extents may be another's.
                if self.catalogue.find(session.session_id, context.context_id) is context:
                    await self._contexts.discard(extent)

            await self._bulk("close", session, work, deadline)
        context.discarded = True

    async def save_context(
        self, session: Session, context_id: int, gid: int | None, deadline: float | None
    ) -> None:
        """Make a durable context complete and read-only."""
        await self._bulk("save", session, lambda: self._contexts.save(session, context_id, gid), deadline)

    async def delete_context(self, session: Session, uid: int, name: str, deadline: float | None) -> int:
        """Delete a durable context that nobody has open; return the bytes freed."""
        self._check_known()
        return await self._bulk("delete", session, lambda: self._contexts.delete(uid, name), deadline)

    async def append(
        self, session: Session, ask: requests.Append, deadline: float | None
    ) -> requests.Appended:
        """Append rows to a layer, or keep a tail aside; all or nothing."""
        work = self._contexts.append_tail if ask.tail else self._contexts.append
        return await self._bulk("append", session, lambda: work(session, ask), deadline)

    @property
    def idle(self) -> bool:
        """Whether an evaluation would begin at once."""
        return self.worker.idle and self.queue.idle

    async def ensure_loaded(self, context: Context) -> None:
        """Have the worker know a context; in a turn of the queue."""
        await self._contexts.ensure_loaded(context)

    async def fetch(
        self,
        session: Session,
        ask: requests.FetchIds | requests.FetchRange | requests.FetchTail,
        deadline: float | None,
    ) -> int:
        """Bring rows; return the bytes read from the drive."""

        async def prepare() -> Sequence[messages.FetchIds | messages.FetchRange]:
            context = self.catalogue.get(session.session_id, ask.context_id)
            if isinstance(ask, requests.FetchTail):
                await self._contexts.fetch_tail(session, context, ask)
                return []
            await self._contexts.ensure_loaded(context)
            if isinstance(ask, requests.FetchRange):
                return pieces.of_range(admission.fetch_range(session, context, ask), context.shape)
            return pieces.OfIds(admission.fetch_ids(session, context, ask), context.shape.row_bytes)

        done = await self._in_pieces("fetch", session, prepare, pieces.priority_of(ask), deadline)
        return sum(piece.traffic.read for piece in done)

    async def fetch_keys(
        self, session: Session, ask: requests.FetchKeys, deadline: float | None
    ) -> tuple[messages.BroughtKeys, int]:
        """Bring evaluation keys; return what says which they are, and the bytes read from the drive."""

        async def prepare() -> Sequence[messages.FetchKeys]:
            context = self.catalogue.get(session.session_id, ask.context_id)
            await self._contexts.ensure_loaded(context)
            return [admission.fetch_keys(session, context, ask)]

        [done] = await self._in_pieces("fetch", session, prepare, Priority.bulk, deadline)
        assert done.keys is not None
        return done.keys, done.traffic.read

    def _check_known(self) -> None:
        if not self.known:
            raise self.worker.unavailable()

    @property
    def card(self) -> str:
        """PCI address of the FPGA, empty for none."""
        driver = self.settings.driver
        return driver.card if driver.kind == "xrt" else ""

    @property
    def open_contexts(self) -> int:
        """How many contexts are open, without those that are lost."""
        return sum(not context.lost for context in self.catalogue)

    async def configure(
        self, session: Session, request_for: Callable[[int], messages.CecRequest], deadline: float | None
    ) -> tuple[Status, int]:
        """Carry out what ``request_for`` makes of the number of open contexts; return what is then, and it.

        Raises :class:`InvalidInput` if the drive has no card, and what the worker raises.
        """
        if not self.card:
            raise InvalidInput(f"drive {self.name} has no FPGA to configure")

        async def work() -> tuple[Status, int]:
            contexts = self.open_contexts
            status = (await self._call(request_for(contexts))).bitstreams
            assert status is not None
            return status, contexts

        return await self._bulk("configure", session, work, deadline)

    async def _bulk(
        self, operation: str, session: Session, work: Callable[[], Awaitable[T]], deadline: float | None
    ) -> T:
        return await self.queue.submit(session, work, deadline, operation=operation, priority=Priority.bulk)

    async def _in_pieces(
        self,
        operation: str,
        session: Session,
        prepare: Callable[[], Awaitable[Sequence[messages.Request]]],
        priority: Priority,
        deadline: float | None,
    ) -> list[messages.Done]:
        """Carry out what ``prepare`` makes, each piece in a turn of its own."""
        done: list[messages.Done] = []

        async def work() -> bool:
            # Checked anew each time: meanwhile the context may have been closed, or lost.
            parts = await prepare()
            if parts:
                done.append(await self._call(parts[len(done)]))
            return len(done) < len(parts)

        while await self.queue.submit(session, work, deadline, operation=operation, priority=priority):
            pass
        return done

    async def _call(self, request: messages.Request, fd: int | None = None) -> messages.Done:
        done = await self.worker.call(request, fd)
        self.key_bytes = done.key_bytes
        return done

    def _account(self, piece: Piece) -> None:
        if piece.operation not in _CHANGE_NOTHING:
            self.changed()
        # One piece at a time: what was moved since the last one was moved by this one.
        moved = self.worker.take_moved()
        self.usage.add(piece, moved)
        if isinstance(piece.flow, Session):
            piece.flow.usage.add(piece, moved)
        if self.observer is not None:
            self.observer(piece, moved)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(min(HEARTBEAT_S, self.settings.request_timeout_s))
            if not self.worker.up:
                continue
            asked = self.worker.pid
            try:
                await self.queue.submit_urgent(lambda: self._call(messages.Health()), operation="health")
            except HillInferError as error:
                log.error("the drive does not answer", drive=self.name, error=error)
                if self.worker.pid == asked:
                    self.worker.replace()

    def _worker_died(self) -> None:
        self.changed()
        error = self.worker.unavailable()
        lost = self.catalogue.mark_lost(f"with drive {self.name}: {self.worker.reason or 'its worker died'}")
        self.key_bytes = 0
        self.queue.cancel_all(error)
        log.warning("contexts lost with the device worker", drive=self.name, contexts=lost)

    async def _worker_starts(self) -> None:
        # Until the pool was open once everything may change, and is looked at anew.
        if self._durables is not None and not self.known:
            await self._durables.close()
            await self._durables.open()
            self.worker.new_pool_id(self._durables.new_pool_id)

    async def _worker_ready(self) -> None:
        await self._recover()
        await tell_of_arenas(self.worker, self._sessions)

    async def _recover(self) -> None:
        """With the first worker: take in durable contexts, and discard whatever else the pool holds."""
        identity = self.worker.identity
        assert identity is not None
        if self.known:
            if identity.pool_id != self._pool_id and self._durables is not None:
                raise DamagedCatalogue(
                    f"{identity.path} is another pool than before; bring back the one that was"
                )
            return
        self._contexts = self._empty(identity.capacity)
        if self._durables is not None:
            for durable in await self._durables.recover(identity):
                self.catalogue.restore(durable)
            await discard_free(self.worker, self.catalogue.allocator, self.name)
        self._pool_id = identity.pool_id
        # Another pool made in its place would be another pool.
        self.worker.new_pool_id("")

    def _empty(self, capacity: int) -> ContextWork:
        # The first granule holds the pool's header.
        allocator = ExtentAllocator(capacity, reserved=GRANULE)
        catalogue = Catalogue(allocator, self._quotas)
        return ContextWork(catalogue, self._durables, self._call, self._sessions.may_read)
