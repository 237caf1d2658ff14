"""The cold pool as a service: sessions and their contexts, on one drive or several."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from hillinfer_core.errors import (
    DeviceUnavailable,
    ForeignToken,
    HillInferError,
    InvalidInput,
    NotAllowed,
    UnknownContext,
)
from hillinfer_core.packed import Evaluated, unpack_results

from ..domain.contexts import Context
from ..domain.durable import Durable
from ..logs import get_logger
from ..worker import messages
from . import requests
from .administration import Administration
from .calls import Answer, Call
from .drive import Drive, DriveSettings
from .express import Express, Permit, Run
from .limits import Limits
from .sessions import Peer, Session, Sessions
from .work_queue import Piece, Result

log = get_logger(__name__)


P = ParamSpec("P")
R = TypeVar("R")


def _counted(
    method: Callable[Concatenate[ColdPoolService, Session, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[ColdPoolService, Session, P], Coroutine[Any, Any, R]]:
    """Make a call of ``method`` a request in flight of its session."""

    @wraps(method)
    async def call(self: ColdPoolService, session: Session, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.sessions.request(session):
            return await method(self, session, *args, **kwargs)

    return call


class ColdPoolService:
    """Everything a transport can ask for. All methods belong to one event loop.

    Work of a session raises ``QuotaExceeded`` while too many requests of it or of its user are in flight.
    """

    def __init__(
        self,
        drives: Sequence[DriveSettings],
        limits: Limits,
        log_level: str,
        express: Express | None = None,
    ) -> None:
        self.sessions = Sessions(limits)
        self.express = express
        """The selector of the service's event loop, if it is one."""
        self.drives = [Drive(drive, self.sessions, limits.quotas, log_level) for drive in drives]
        if express is not None:
            express.idle = self._is_idle
            for drive in self.drives:
                drive.changed = express.revoke
        self.administration = Administration(self.drives, self.sessions)
        self.refused: Counter[str] = Counter()
        """Errors that transports answered with, by name."""
        self._opening: dict[tuple[int, str], Drive] = {}
        self._openers: Counter[tuple[int, str]] = Counter()
        self._attaching: set[asyncio.Task[None]] = set()
        self._started = time.monotonic()
        self.instance = secrets.token_hex(16)
        """Another in each run of the daemon."""

    @property
    def uptime_s(self) -> float:
        """Seconds since the service was made."""
        return time.monotonic() - self._started

    def apply_limits(self, limits: Limits) -> None:
        """Hold sessions and users to other limits and weights from now on; nobody loses what they have."""
        self.sessions.apply(limits)
        for drive in self.drives:
            drive.apply(limits.quotas)

    def set_log_level(self, level: str) -> None:
        """Have workers that start from now on log from ``level``."""
        for drive in self.drives:
            drive.worker.set_log_level(level)

    def observe(
        self,
        observer: Callable[[Drive, Piece, messages.Traffic], None],
        run_observer: Callable[[Drive, Run], None] = lambda drive, run: None,
    ) -> None:
        """Have ``observer`` called with each piece of work that a drive is done with, and the bytes moved.

        ``run_observer`` is for what the express carried. Neither may block or raise.
        """
        for drive in self.drives:
            drive.observer = partial(observer, drive)
            drive.run_observer = partial(run_observer, drive)

    def count_refused(self, error: str) -> None:
        """Count an answer that is an error."""
        self.refused[error] += 1

    async def start(self) -> None:
        """Start every drive; one that cannot be opened is tried again and again while the others serve.

        Raises the error of the first, with all stopped, if none can be opened.
        """
        try:
            started = await asyncio.gather(*(drive.start() for drive in self.drives), return_exceptions=True)
            errors = [error for error in started if isinstance(error, BaseException)]
            for error in errors:
                if not isinstance(error, HillInferError) or len(errors) == len(self.drives):
                    raise error
        except BaseException:
            await self.stop()
            raise
        for drive in self.drives:
            drive.serve()

    async def stop(self) -> None:
        """Fail what waits, stop the drives. Call after the transports have stopped."""
        stopped = await asyncio.gather(*(drive.stop() for drive in self.drives), return_exceptions=True)
        for session in self.sessions:
            self.sessions.remove(session)
            session.close_arena()
        for error in stopped:
            if isinstance(error, BaseException):
                raise error

    async def attach(self, client_name: str, arena_bytes: int, peer: Peer, ring: bool = False) -> Session:
        """Open a session; raises a typed error with nothing left behind. End it with :meth:`detach`.

        One drive must have heard of it: others that are busy do later, before any work of the session, and
        one that is gone or being restarted when it is back.
        """
        session = self.sessions.open(client_name, arena_bytes, peer, ring)
        try:
            if session.arena_fd is not None:
                await self._attach_arena(session)
        except BaseException:
            await self.detach(session)
            raise
        return session

    async def detach(self, session: Session) -> None:
        """End a session and free all it held; work of it that is already running ends first."""
        self.sessions.remove(session)
        for drive in self.drives:
            drive.queue.cancel(session.session_id, ForeignToken(session.end_reason))
        await asyncio.gather(*(drive.detach(session) for drive in self.drives))
        session.close_arena()
        log.info("session ended", session=session.session_id, pid=session.peer.pid)

    @_counted
    async def open_context(
        self, session: Session, ask: requests.OpenContext, deadline: float | None
    ) -> Context:
        """Open a context: a durable one, or a volatile one that begins empty or with a durable one."""
        self.sessions.drain.check()
        name = session.peer.uid, ask.durable_name
        drive = self._opening.get(name) or self._drive_for(session, ask)
        if not ask.durable_name:
            return await drive.open_context(session, ask, deadline)
        # The name must not come to be on two drives, however many ask for it at once.
        self._opening[name] = drive
        self._openers[name] += 1
        try:
            return await drive.open_context(session, ask, deadline)
        finally:
            self._openers[name] -= 1
            if not self._openers[name]:
                del self._openers[name], self._opening[name]

    @_counted
    async def close_context(self, session: Session, context_id: int, deadline: float | None) -> None:
        """Close a context, also a lost one, and free what is its own."""
        await self._drive_of(context_id).close_context(session, context_id, deadline)

    @_counted
    async def save_context(
        self, session: Session, context_id: int, gid: int | None, deadline: float | None
    ) -> None:
        """Make a durable context complete and read-only, for its owner and the group ``gid``."""
        if gid is not None:
            self.sessions.check_may_share(session, gid)
        await self._drive_of(context_id).save_context(session, context_id, gid, deadline)

    def list_contexts(self, session: Session) -> list[tuple[Drive, Durable]]:
        """Return the durable contexts that the session's user may begin with: all for root."""
        found = [(drive, durable) for drive in self.drives for durable in drive.catalogue.durables]
        return [(drive, durable) for drive, durable in found if self.sessions.may_read(session, durable)]

    @_counted
    async def delete_context(self, session: Session, uid: int, name: str, deadline: float | None) -> int:
        """Delete a durable context; return the bytes freed. Root may delete those of others."""
        if session.peer.uid not in (0, uid):
            raise NotAllowed(f"user {session.peer.uid} may not delete contexts of user {uid}")
        drive = self._drive_with(uid, name) or self._drive_without(name)
        return await drive.delete_context(session, uid, name, deadline)

    @_counted
    async def append(
        self, session: Session, ask: requests.Append, deadline: float | None
    ) -> requests.Appended:
        """Append rows to a layer; all or nothing."""
        return await self._drive_of(ask.context_id).append(session, ask, deadline)

    @_counted
    async def evaluate(
        self, session: Session, ask: requests.Evaluate, deadline: float | None
    ) -> list[Evaluated]:
        """Rank tokens and bring missing rows; one result for each evaluation."""
        packed: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._evaluate(session, ask, deadline, packed)
        return unpack_results(await packed)

    def begin_evaluate(
        self,
        session: Session,
        ask: requests.Evaluate,
        deadline: float | None,
        answer: Answer,
        began: float | None = None,
    ) -> Call:
        """Like :meth:`evaluate`, without a task: ``answer`` gets packed results, at once or later.

        ``began`` is for one that the express has sent already; see :class:`Evaluations`.
        """
        self.sessions.begin(session)
        call = Call(answer, partial(self.sessions.end, session))
        try:
            self._evaluate(session, ask, deadline, call, began)
        except HillInferError as error:
            call.set_exception(error)
        return call

    def permit(self, session: Session, ask: requests.Evaluate) -> Permit | None:
        """Return leave for the express to repeat ``ask``, which was carried out; raises as that would."""
        for number, drive in enumerate(self.drives):
            if ask.terms.evaluations[0].context_id in drive.catalogue:
                return drive.evaluations.permit(session, ask, number)
        return None

    def _is_idle(self) -> bool:
        return self.sessions.idle and all(drive.idle for drive in self.drives)

    def _evaluate(
        self,
        session: Session,
        ask: requests.Evaluate,
        deadline: float | None,
        result: Result,
        began: float | None = None,
    ) -> None:
        drives = [self._drive_of(item.context_id) for item in ask.terms.evaluations] or self.drives[:1]
        if any(drive is not drives[0] for drive in drives[1:]):
            raise InvalidInput("the contexts of one evaluation request must lie on one drive")
        drives[0].evaluations.begin(session, ask, deadline, result, began)

    @_counted
    async def fetch(
        self,
        session: Session,
        ask: requests.FetchIds | requests.FetchRange | requests.FetchTail,
        deadline: float | None,
    ) -> int:
        """Bring rows; return the bytes read from the drive."""
        return await self._drive_of(ask.context_id).fetch(session, ask, deadline)

    @_counted
    async def fetch_keys(
        self, session: Session, ask: requests.FetchKeys, deadline: float | None
    ) -> tuple[messages.BroughtKeys, int]:
        """Bring evaluation keys; return what says which they are, and the bytes read from the drive."""
        return await self._drive_of(ask.context_id).fetch_keys(session, ask, deadline)

    async def _attach_arena(self, session: Session) -> None:
        waiting = {asyncio.create_task(drive.attach(session)) for drive in self.drives}
        for task in waiting:
            self._attaching.add(task)
            task.add_done_callback(self._attached)
        errors: list[BaseException] = []
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            errors += [error for task in done if (error := task.exception())]
            for error in errors:
                if not isinstance(error, DeviceUnavailable):
                    raise error
            if len(errors) + len(waiting) < len(self.drives):
                return
        raise errors[0]

    def _attached(self, task: asyncio.Task[None]) -> None:
        self._attaching.discard(task)
        # A drive that is away hears of all sessions when it is back.
        error = None if task.cancelled() else task.exception()
        if error and not isinstance(error, DeviceUnavailable):
            log.warning("a drive did not take in a session", error=error)

    @property
    def _serving(self) -> list[Drive]:
        return [drive for drive in self.drives if drive.worker.up] or self.drives

    def _drive_of(self, context_id: int) -> Drive:
        for drive in self.drives:
            if context_id in drive.catalogue:
                return drive
        raise UnknownContext(f"context {context_id} is not an open context of this session")

    def _with(self, uid: int, name: str) -> tuple[Drive, Durable] | None:
        for drive in self.drives:
            for durable in drive.catalogue.durables:
                if (durable.uid, durable.name) == (uid, name):
                    return drive, durable
        return None

    def _drive_with(self, uid: int, name: str) -> Drive | None:
        found = self._with(uid, name)
        return found[0] if found else None

    def _drive_without(self, name: str) -> Drive:
        """Return a drive to say that there is no such context, unless one that is gone may have it."""
        if unknown := [str(drive.worker.unavailable()) for drive in self.drives if not drive.known]:
            raise UnknownContext(f"no drive that serves has a context {name!r}; {'; '.join(unknown)}")
        return self._serving[0]

    def _drive_for(self, session: Session, ask: requests.OpenContext) -> Drive:
        """Return the drive of a named context, else of the session's other contexts, else the emptiest."""
        name, uid = ask.base_name or ask.durable_name, session.peer.uid
        if ask.base_name and ask.base_uid is not None:
            uid = ask.base_uid
        if name and (found := self._with(uid, name)):
            # As if it were not there: names of others are nobody's business.
            if self.sessions.may_read(session, found[1]):
                return found[0]
            raise UnknownContext(f"there is no context {name!r} of user {uid} that this user may read")
        if ask.base_name:
            return self._drive_without(name)
        for drive in self._serving:
            if drive.catalogue.of_session(session.session_id):
                return drive
        return max(self._serving, key=lambda drive: drive.catalogue.allocator.free_bytes)
