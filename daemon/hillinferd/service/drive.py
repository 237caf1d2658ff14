"""One drive: its worker, its queue, its contexts, and what of them outlives the daemon."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hillinfer_core.errors import (
    DamagedCatalogue,
    DeviceUnavailable,
    HillInferError,
    InvalidInput,
)

from ..cec.loader import Status
from ..domain.contexts import Catalogue, Context, Quotas
from ..domain.durable import Durable
from ..domain.extents import GRANULE, Extent, ExtentAllocator
from ..domain.placement import Placed
from ..driver.settings import DriverSettings
from ..logs import get_logger
from ..worker import messages
from . import admission, requests
from .durable_store import DurableStore
from .sessions import Session, Sessions
from .supervisor import Supervisor
from .work_queue import WorkQueue

log = get_logger(__name__)

HEARTBEAT_S = 10.0
"""Longest between two questions whether an idle drive still answers. Our choice."""

REQUEST_TIMEOUT_S = 60.0
"""Longest a request may take before the worker counts as hung; real ones take at most seconds. Our choice."""


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
        self.queue = WorkQueue()
        self.worker = Supervisor(
            settings.name,
            settings.driver,
            log_level,
            request_timeout_s=settings.request_timeout_s,
            on_start=self._worker_starts,
            on_ready=self._worker_ready,
            on_death=self._worker_died,
        )
        self.catalogue = Catalogue(ExtentAllocator(0), quotas)
        self.key_bytes = 0
        self._sessions = sessions
        self._quotas = quotas
        path, pool = settings.catalogue, Path(settings.driver.path)
        self._durables = DurableStore(path, pool) if path else None
        self._pool_id = ""
        self._tasks: list[asyncio.Task[None]] = []

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
        await self.queue.submit_urgent(lambda: self.worker.call(request, session.arena_fd))

    async def detach(self, session: Session) -> None:
        """Free what a session holds on this drive; work of it that is already running ends first."""
        await self.queue.submit_urgent(lambda: self._free(session))

    async def open_context(
        self, session: Session, ask: requests.OpenContext, deadline: float | None
    ) -> Context:
        """Open a context; see ``OpenContextRequest`` in cold_pool.proto."""
        return await self.queue.submit(session.session_id, lambda: self._open(session, ask), deadline)

    async def close_context(self, session: Session, context_id: int, deadline: float | None) -> None:
        """Close a context, also a lost one, and free what is its own."""
        context = self.catalogue.find(session.session_id, context_id)

        async def work() -> None:
            if self.catalogue.find(session.session_id, context_id) is context:
                await self._close(context)

        await self.queue.submit(session.session_id, work, deadline)

    async def save_context(self, session: Session, context_id: int, deadline: float | None) -> None:
        """Make a durable context complete and read-only."""
        await self.queue.submit(session.session_id, lambda: self._save(session, context_id), deadline)

    async def delete_context(self, session: Session, uid: int, name: str, deadline: float | None) -> int:
        """Delete a durable context that nobody has open; return the bytes freed."""
        return await self.queue.submit(session.session_id, lambda: self._delete(uid, name), deadline)

    async def append(
        self, session: Session, ask: requests.Append, deadline: float | None
    ) -> requests.Appended:
        """Append rows to a layer, or keep a tail aside; all or nothing."""
        work = self._append_tail if ask.tail else self._append
        return await self.queue.submit(session.session_id, lambda: work(session, ask), deadline)

    async def evaluate(
        self, session: Session, ask: requests.Evaluate, deadline: float | None
    ) -> list[messages.Evaluated]:
        """Rank tokens and bring missing rows; one result for each evaluation."""

        async def work() -> list[messages.Evaluated]:
            request = admission.evaluate(session, self.catalogue, ask)
            for item in request.evaluations:
                await self._ensure_loaded(self.catalogue.get(session.session_id, item.context_id))
            return (await self._call(request)).evaluated

        return await self.queue.submit(session.session_id, work, deadline)

    async def fetch(
        self,
        session: Session,
        ask: requests.FetchIds | requests.FetchRange | requests.FetchTail,
        deadline: float | None,
    ) -> int:
        """Bring rows; return the bytes read from the drive."""

        async def work() -> int:
            context = self.catalogue.get(session.session_id, ask.context_id)
            request: messages.FetchIds | messages.FetchRange
            if isinstance(ask, requests.FetchTail):
                return await self._fetch_tail(session, context, ask)
            if isinstance(ask, requests.FetchRange):
                request = admission.fetch_range(session, context, ask)
            else:
                request = admission.fetch_ids(session, context, ask)
                if not request.count_per_head:
                    return 0
            await self._ensure_loaded(context)
            return (await self._call(request)).traffic.read

        return await self.queue.submit(session.session_id, work, deadline)

    @property
    def card(self) -> str:
        """PCI address of the FPGA, empty for none."""
        driver = self._settings.driver
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

        return await self.queue.submit(session.session_id, work, deadline)

    async def _call(self, request: messages.Request, fd: int | None = None) -> messages.Done:
        done = await self.worker.call(request, fd)
        self.key_bytes = done.key_bytes
        return done

    async def _open(self, session: Session, ask: requests.OpenContext) -> Context:
        if ask.base_name:
            return await self._open_reader(session, ask)
        if ask.durable_name:
            return await self._open_writer(session, ask)
        context = self.catalogue.open(session.session_id, session.peer.uid, ask.shape)
        try:
            await self._call(messages.OpenContext(context.context_id, ask.shape))
        except BaseException:
            self.catalogue.close(context)
            raise
        return context

    async def _open_writer(self, session: Session, ask: requests.OpenContext) -> Context:
        store, uid, name = self._store(), session.peer.uid, ask.durable_name
        new = Durable(0, name, uid, ask.shape, dict(ask.labels), int(time.time()))
        context = self.catalogue.open_writer(session.session_id, uid, name, ask.shape, ask.labels, new)
        try:
            if context.durable is new:
                await store.create(new)
            await self._ensure_loaded(context)
        except BaseException:
            self.catalogue.close(context)
            if not new.record_id and context.durable is new:
                self.catalogue.delete(new)
            raise
        return context

    async def _open_reader(self, session: Session, ask: requests.OpenContext) -> Context:
        self._store()
        uid = session.peer.uid
        context = self.catalogue.open_reader(session.session_id, uid, ask.base_name, ask.shape, ask.labels)
        assert context.base is not None
        try:
            await self._load(context.base)
            request = messages.OpenContext(context.context_id, ask.shape, context.base.context_id)
            context.evaluation_key_bytes = (await self._call(request)).context_key_bytes
        except BaseException:
            self.catalogue.close(context)
            await self._release(context.base)
            raise
        return context

    async def _append(self, session: Session, ask: requests.Append) -> requests.Appended:
        context = self.catalogue.get(session.session_id, ask.context_id)
        rows = admission.append_rows(session, context, ask)
        await self._ensure_loaded(context)
        placed = self.catalogue.reserve(context, ask.layer, ask.first_token, ask.tokens)
        request = messages.Append(
            session.session_id,
            ask.context_id,
            ask.layer,
            ask.first_token,
            ask.tokens,
            rows,
            placed,
            durable=context.durable is not None,
        )
        try:
            done = await self._call(request)
            if context.durable:
                await self._record(context.durable, ask, placed, done)
        except BaseException as error:
            # A cancelled call leaves its reply behind, which another call would take for its own.
            if isinstance(error, HillInferError):
                await self._discard([item.extent for item in placed])
            self.catalogue.rollback(context, placed)
            raise
        self.catalogue.commit(context, ask.layer, ask.tokens, placed)
        context.evaluation_key_bytes = done.context_key_bytes
        held = context.layers[ask.layer].tokens
        return requests.Appended(held, context.evaluation_key_bytes, context.checksum_bytes)

    async def _record(
        self, durable: Durable, ask: requests.Append, placed: list[Placed], done: messages.Done
    ) -> None:
        assert done.appended is not None
        try:
            await self._store().append(durable, ask.layer, ask.tokens, placed, done.appended)
        except BaseException:
            # The worker is ahead of the catalogue file: it has to begin again from there.
            await self._unload(durable)
            raise

    async def _append_tail(self, session: Session, ask: requests.Append) -> requests.Appended:
        context = self.catalogue.get(session.session_id, ask.context_id)
        rows = admission.append_tail(session, context, ask)
        assert session.arena_fd is not None
        assert context.durable is not None
        data = os.pread(session.arena_fd, rows.length, rows.offset)
        await self._store().put_tail(context.durable, ask.layer, ask.tokens, data)
        context.durable.tails[ask.layer] = ask.tokens
        held = context.layers[ask.layer].tokens
        return requests.Appended(held, context.evaluation_key_bytes, context.checksum_bytes)

    async def _fetch_tail(self, session: Session, context: Context, ask: requests.FetchTail) -> int:
        rows = admission.fetch_tail(session, context, ask)
        kept = context.durable or context.base
        if kept is None or rows.length == 0:
            return 0
        data = await self._store().tail(kept, ask.layer, rows.length)
        assert session.arena_fd is not None
        os.pwrite(session.arena_fd, data, rows.offset)
        return 0

    async def _save(self, session: Session, context_id: int) -> None:
        context = self.catalogue.get(session.session_id, context_id)
        durable = context.durable
        if durable is None:
            raise InvalidInput(f"context {context_id} is volatile; open it with durable_name to save it")
        if durable.saved:
            return
        lengths = {layer.tokens + tail for layer, tail in zip(durable.layers, durable.tails, strict=True)}
        if len(lengths) > 1:
            raise InvalidInput(
                f"the layers of {durable.name!r} hold {min(lengths)} to {max(lengths)} tokens; "
                "append the same number to each before saving"
            )
        await self._ensure_loaded(context)
        done = await self._call(messages.SealContext(context_id))
        try:
            await self._store().save(durable, done.sealed)
        except BaseException:
            await self._unload(durable)
            raise
        durable.saved = True

    async def _delete(self, uid: int, name: str) -> int:
        store = self._store()
        durable = self.catalogue.find_durable(uid, name)
        durable.check_free("cannot delete")
        freed = durable.extent_bytes
        await store.delete(durable)
        await self._unload(durable)
        await self._discard(durable.extents)
        self.catalogue.delete(durable)
        return freed

    async def _close(self, context: Context) -> None:
        if context.durable is None:
            await self._drop(context.context_id)
            await self._discard(context.own_extents)
        self.catalogue.close(context)
        if durable := context.durable or context.base:
            await self._release(durable)

    async def _release(self, durable: Durable) -> None:
        if not durable.writer and not durable.readers:
            await self._unload(durable)

    async def _unload(self, durable: Durable) -> None:
        if durable.loaded:
            durable.loaded = False
            await self._drop(durable.context_id)

    async def _drop(self, context_id: int) -> None:
        try:
            await self._call(messages.DropContext(context_id))
        except HillInferError as error:
            log.debug("context not dropped from the worker", context=context_id, error=error)

    async def _discard(self, extents: list[Extent]) -> None:
        # To be awaited before the extents are freed and can belong to anyone else.
        try:
            for start in range(0, len(extents), messages.MAX_EXTENTS):
                await self._call(messages.Discard(extents[start : start + messages.MAX_EXTENTS]))
        except HillInferError as error:
            log.warning("space of a context was not discarded", error=error)

    async def _free(self, session: Session) -> None:
        for context in self.catalogue.of_session(session.session_id):
            await self._close(context)
        if session.arena_fd is not None:
            try:
                await self._call(messages.DetachArena(session.session_id))
            except HillInferError as error:
                log.debug("arena not detached from the worker", session=session.session_id, error=error)

    async def _ensure_loaded(self, context: Context) -> None:
        if context.durable is not None:
            await self._load(context.durable)

    async def _load(self, durable: Durable) -> None:
        if durable.loaded:
            return
        fd = await self._store().content(durable)
        try:
            await self._call(messages.LoadContext(durable.context_id, durable.shape), fd)
        finally:
            os.close(fd)
        durable.loaded = True

    def _store(self) -> DurableStore:
        if self._durables is None:
            raise InvalidInput(
                "this daemon keeps no durable contexts, its cold pool goes with it; name a file with --pool"
            )
        if not self.known:
            raise self.worker.unavailable()
        return self._durables

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(min(HEARTBEAT_S, self.settings.request_timeout_s))
            if not self.worker.up:
                continue
            try:
                await self.queue.submit_urgent(lambda: self._call(messages.Health()))
            except HillInferError as error:
                log.error("the drive does not answer", drive=self.name, error=error)
                self.worker.replace()

    def _worker_died(self) -> None:
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

    async def _worker_ready(self) -> None:
        await self._recover()
        told = [session for session in self._sessions if session.arena_fd is not None]
        for session in told:
            if session.arena_fd is not None:
                request = messages.AttachArena(session.session_id, session.arena.nbytes)
                await self.worker.prepare(request, session.arena_fd)
        for session in told:
            if not self._sessions.is_open(session):
                await self.worker.prepare(messages.DetachArena(session.session_id))

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
        # The first granule holds the pool's header.
        self.catalogue = Catalogue(ExtentAllocator(identity.capacity, reserved=GRANULE), self._quotas)
        if self._durables is not None:
            for durable in await self._durables.recover(identity):
                self.catalogue.restore(durable)
            free = self.catalogue.allocator.free_ranges()
            for start in range(0, len(free), messages.MAX_EXTENTS):
                await self.worker.prepare(messages.Discard(free[start : start + messages.MAX_EXTENTS]))
        self._pool_id = identity.pool_id
