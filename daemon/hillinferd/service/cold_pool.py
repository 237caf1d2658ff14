"""The cold pool as a service: sessions, contexts and the work on them, whatever the transport."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from hillinfer_core.errors import DeviceUnavailable, ForeignToken, HillInferError
from hillinfer_core.layout import Shape

from ..domain.contexts import Catalogue, Context
from ..domain.extents import GRANULE, Extent, ExtentAllocator
from ..logs import get_logger
from ..worker import messages
from . import admission, requests
from .sessions import Peer, Session, Sessions
from .supervisor import Supervisor, WorkerSettings
from .work_queue import WorkQueue

log = get_logger(__name__)


@dataclass(frozen=True)
class Limits:
    """Bytes of evaluation keys in DRAM, bytes of one arena, and sessions attached at once."""

    evaluation_keys_dram: int
    arena_limit: int
    session_limit: int


class ColdPoolService:
    """Everything a transport can ask for. All methods belong to one event loop.

    Work for the device waits in one :class:`WorkQueue` and is carried out one piece at a time, so that the
    books (:class:`Catalogue`) are changed by one piece of work at a time too.
    """

    def __init__(self, worker: WorkerSettings, limits: Limits) -> None:
        # The first granule holds the pool's header.
        allocator = ExtentAllocator(worker.capacity, reserved=GRANULE)
        self.catalogue = Catalogue(allocator, limits.evaluation_keys_dram)
        self.sessions = Sessions(limits.arena_limit, limits.session_limit)
        self.worker = Supervisor(worker, self._worker_died, self._worker_ready)
        self._queue = WorkQueue()
        self._tasks: list[asyncio.Task[None]] = []
        self._started = time.monotonic()

    @property
    def uptime_s(self) -> float:
        """Seconds since the service was made."""
        return time.monotonic() - self._started

    async def start(self) -> None:
        """Start the worker and the queue; raises the worker's error if its drive cannot be opened."""
        await self.worker.start()
        self._tasks = [asyncio.create_task(self._queue.run()), asyncio.create_task(self.worker.watch())]

    async def stop(self) -> None:
        """Fail what waits, stop the worker. Call after the transports have stopped."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._queue.cancel_all(DeviceUnavailable("the daemon is stopping"))
        await self.worker.stop()
        for session in self.sessions:
            self.sessions.remove(session)
            session.close_arena()

    async def attach(self, client_name: str, arena_bytes: int, peer: Peer) -> Session:
        """Open a session; raises a typed error with nothing left behind. End it with :meth:`detach`."""
        session = self.sessions.open(client_name, arena_bytes, peer)
        if session.arena_fd is not None:
            request = messages.AttachArena(session.session_id, session.arena.nbytes)
            try:
                await self._queue.submit_urgent(lambda: self.worker.call(request, session.arena_fd))
            except BaseException:
                self.sessions.remove(session)
                session.close_arena()
                raise
        return session

    async def detach(self, session: Session) -> None:
        """End a session and free all it held; work of it that is already running ends first."""
        self.sessions.remove(session)
        self._queue.cancel(session.session_id, ForeignToken("the session has ended"))
        await self._queue.submit_urgent(lambda: self._free(session))

    async def open_context(self, session: Session, shape: Shape, deadline: float | None) -> Context:
        """Open a volatile context."""
        return await self._queue.submit(
            session.session_id, lambda: self._open_context(session, shape), deadline
        )

    async def close_context(self, session: Session, context_id: int, deadline: float | None) -> None:
        """Close a context, also a lost one, and free its extents."""
        context = self.catalogue.find(session.session_id, context_id)

        async def work() -> None:
            if self.catalogue.find(session.session_id, context_id) is context:
                await self._close_context(context)

        await self._queue.submit(session.session_id, work, deadline)

    async def append(
        self, session: Session, ask: requests.Append, deadline: float | None
    ) -> requests.Appended:
        """Append rows to a layer; all or nothing."""
        return await self._queue.submit(session.session_id, lambda: self._append(session, ask), deadline)

    async def evaluate(
        self, session: Session, ask: requests.Evaluate, deadline: float | None
    ) -> list[messages.Evaluated]:
        """Rank tokens and bring missing rows; one result for each evaluation."""

        async def work() -> list[messages.Evaluated]:
            return (await self.worker.call(admission.evaluate(session, self.catalogue, ask))).evaluated

        return await self._queue.submit(session.session_id, work, deadline)

    async def fetch(
        self, session: Session, ask: requests.FetchIds | requests.FetchRange, deadline: float | None
    ) -> int:
        """Bring rows; return the bytes read from the drive."""

        async def work() -> int:
            context = self.catalogue.get(session.session_id, ask.context_id)
            request: messages.FetchIds | messages.FetchRange
            if isinstance(ask, requests.FetchRange):
                request = admission.fetch_range(session, context, ask)
            else:
                request = admission.fetch_ids(session, context, ask)
                if not request.count_per_head:
                    return 0
            return (await self.worker.call(request)).traffic.read

        return await self._queue.submit(session.session_id, work, deadline)

    async def _open_context(self, session: Session, shape: Shape) -> Context:
        context = self.catalogue.open(session.session_id, shape)
        try:
            await self.worker.call(messages.OpenContext(context.context_id, shape))
        except BaseException:
            self.catalogue.close(context)
            raise
        return context

    async def _append(self, session: Session, ask: requests.Append) -> requests.Appended:
        context = self.catalogue.get(session.session_id, ask.context_id)
        rows = admission.append_rows(session, context, ask)
        placed = self.catalogue.reserve(context, ask.layer, ask.first_token, ask.tokens)
        request = messages.Append(
            session.session_id, ask.context_id, ask.layer, ask.first_token, ask.tokens, rows, placed
        )
        try:
            await self.worker.call(request)
        except BaseException as error:
            # A cancelled call leaves its reply behind, which another call would take for its own.
            if isinstance(error, HillInferError):
                await self._discard(context, [item.extent for item in placed])
            self.catalogue.rollback(placed)
            raise
        self.catalogue.commit(context, ask.layer, ask.tokens, placed)
        held = context.layers[ask.layer].tokens
        return requests.Appended(held, context.evaluation_key_bytes, context.checksum_bytes)

    async def _close_context(self, context: Context) -> None:
        try:
            await self.worker.call(messages.DropContext(context.context_id))
        except HillInferError as error:
            log.debug("context not dropped from the worker", context=context.context_id, error=error)
        await self._discard(context, context.extents)
        self.catalogue.close(context)

    async def _discard(self, context: Context, extents: list[Extent]) -> None:
        # To be awaited before the extents are freed and can belong to anyone else.
        try:
            for start in range(0, len(extents), messages.MAX_EXTENTS):
                await self.worker.call(messages.Discard(extents[start : start + messages.MAX_EXTENTS]))
        except HillInferError as error:
            log.warning("space of a context was not discarded", context=context.context_id, error=error)

    async def _free(self, session: Session) -> None:
        contexts = self.catalogue.of_session(session.session_id)
        for context in contexts:
            await self._close_context(context)
        if session.arena_fd is not None:
            session.close_arena()
            try:
                await self.worker.call(messages.DetachArena(session.session_id))
            except HillInferError as error:
                log.debug("arena not detached from the worker", session=session.session_id, error=error)
        log.info(
            "session ended", session=session.session_id, pid=session.peer.pid, contexts_freed=len(contexts)
        )

    def _worker_died(self) -> None:
        lost = self.catalogue.mark_lost()
        self._queue.cancel_all(
            DeviceUnavailable("the device worker died; its contexts are lost, open and fill new ones")
        )
        log.warning("contexts lost with the device worker", contexts=lost)

    async def _worker_ready(self) -> None:
        told = [session for session in self.sessions if session.arena_fd is not None]
        for session in told:
            if session.arena_fd is not None:
                request = messages.AttachArena(session.session_id, session.arena.nbytes)
                await self.worker.prepare(request, session.arena_fd)
        for session in told:
            if not self.sessions.is_open(session):
                await self.worker.prepare(messages.DetachArena(session.session_id))
