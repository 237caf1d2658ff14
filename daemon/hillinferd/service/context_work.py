"""The contexts of one drive: what is done to them, in the worker, in the books and in the catalogue file."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Awaitable, Callable

from hillinfer_core.errors import HillInferError, InvalidInput, UnknownContext

from ..domain.contexts import Catalogue, Context
from ..domain.durable import Durable
from ..domain.extents import Extent
from ..domain.placement import Placed
from ..logs import get_logger
from ..worker import messages
from . import admission, pieces, requests
from .durable_store import DurableStore
from .sessions import Session

log = get_logger(__name__)

Call = Callable[..., Awaitable[messages.Done]]
MayRead = Callable[[Session, Durable], bool]


class ContextWork:
    """Work on contexts, carried out one piece at a time: each method is one piece, for the drive's queue.

    ``call`` carries a request to the worker; ``store`` is None for a pool that goes with the daemon;
    ``may_read`` says who may begin with what. What
    raises has changed nothing that a client could see.
    """

    def __init__(
        self, catalogue: Catalogue, store: DurableStore | None, call: Call, may_read: MayRead
    ) -> None:
        self.catalogue = catalogue
        self._durables = store
        self._call = call
        self._may_read = may_read

    async def open(self, session: Session, ask: requests.OpenContext) -> Context:
        """Open a context; see ``OpenContextRequest`` in cold_pool.proto."""
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
        new = Durable(
            0, name, uid, ask.shape, dict(ask.labels), int(time.time()), unique=secrets.token_hex(16)
        )
        context = self.catalogue.open_writer(session.session_id, uid, name, ask.shape, ask.labels, new)
        try:
            if context.durable is new:
                await store.create(new)
            await self.ensure_loaded(context)
        except BaseException:
            self.catalogue.close(context)
            if not new.record_id and context.durable is new:
                self.catalogue.delete(new)
            raise
        return context

    async def _open_reader(self, session: Session, ask: requests.OpenContext) -> Context:
        self._store()
        uid = session.peer.uid
        owner = uid if ask.base_uid is None else ask.base_uid
        durable = self.catalogue.find_durable(owner, ask.base_name)
        # Between admission and its turn it may have become another.
        if not self._may_read(session, durable):
            raise UnknownContext(f"there is no context {ask.base_name!r} that this user may read")
        context = self.catalogue.open_reader(session.session_id, uid, durable, ask.shape, ask.labels)
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

    async def append(self, session: Session, ask: requests.Append) -> requests.Appended:
        """Append rows to a layer."""
        context = self.catalogue.get(session.session_id, ask.context_id)
        rows = admission.append_rows(session, context, ask)
        await self.ensure_loaded(context)
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
        if context.durable:
            # Recorded with the append: what was kept aside is among the new tokens, or never will be.
            self.catalogue.set_tail(context.durable, ask.layer, 0)
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

    async def append_tail(self, session: Session, ask: requests.Append) -> requests.Appended:
        """Keep rows after the last whole unit aside."""
        context = self.catalogue.get(session.session_id, ask.context_id)
        rows = admission.append_tail(session, context, ask)
        assert session.arena_fd is not None
        assert context.durable is not None
        self.catalogue.check_tail(context, context.durable, ask.layer, ask.tokens)
        data = os.pread(session.arena_fd, rows.length, rows.offset)
        await self._store().put_tail(context.durable, ask.layer, ask.tokens, data)
        self.catalogue.set_tail(context.durable, ask.layer, ask.tokens)
        held = context.layers[ask.layer].tokens
        return requests.Appended(held, context.evaluation_key_bytes, context.checksum_bytes)

    async def fetch_tail(self, session: Session, context: Context, ask: requests.FetchTail) -> int:
        """Bring rows that are kept aside; return the bytes read from the drive, none."""
        rows = admission.fetch_tail(session, context, ask)
        kept = context.durable or context.base
        if kept is None or rows.length == 0:
            return 0
        data = await self._store().tail(kept, ask.layer, rows.length)
        assert session.arena_fd is not None
        os.pwrite(session.arena_fd, data, rows.offset)
        return 0

    async def save(self, session: Session, context_id: int, gid: int | None) -> None:
        """Make a durable context complete and read-only."""
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
        await self.ensure_loaded(context)
        durable.gid = gid
        try:
            done = await self._call(messages.SealContext(context_id))
            await self._store().save(durable, done.sealed)
        except BaseException:
            durable.gid = None
            await self._unload(durable)
            raise
        durable.saved = True

    async def delete(self, uid: int, name: str) -> int:
        """Delete a durable context that nobody has open; return the bytes freed."""
        store = self._store()
        durable = self.catalogue.find_durable(uid, name)
        durable.check_free("cannot delete")
        freed = durable.extent_bytes
        await store.delete(durable)
        await self._unload(durable)
        await self._discard(durable.extents)
        self.catalogue.delete(durable)
        return freed

    async def give_up(self, context: Context) -> list[Extent]:
        """Make a volatile context unusable; return its own extents, cut, to be :meth:`discard`-ed before
        it is closed.
        """
        if context.durable is not None:
            return []
        context.lost = context.lost or "when it began to be closed"
        await self._drop(context.context_id)
        return pieces.of_extents(context.own_extents)

    async def discard(self, extent: Extent) -> None:
        """Discard space of a context that was given up."""
        await self._discard([extent])

    async def close(self, context: Context) -> None:
        """Close a context, also a lost one, and free what is its own."""
        if context.durable is None and not context.discarded:
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

    async def free(self, session: Session) -> None:
        """Free what a session holds, its arena in the worker too."""
        for context in self.catalogue.of_session(session.session_id):
            await self.close(context)
        if session.arena_fd is not None:
            try:
                await self._call(messages.DetachArena(session.session_id))
            except HillInferError as error:
                log.debug("arena not detached from the worker", session=session.session_id, error=error)

    async def ensure_loaded(self, context: Context) -> None:
        """Have the worker know the context, if it is durable and was not used since the worker started."""
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
        return self._durables
