"""Sessions: who is attached, by which token, with which arena."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hillinfer_core.arena import create_arena
from hillinfer_core.errors import DaemonUnavailable, ForeignToken, InvalidInput, NotAllowed, QuotaExceeded
from hillinfer_core.layout import PAGE
from hillinfer_core.ring import ENTRIES, RingFds, create_ring
from hillinfer_core.units import format_bytes

from ..domain.durable import Durable
from ..domain.regions import ArenaSpace
from .drain import Drain
from .limits import Limits
from .usage import Usage

MAX_NAME = 64
"""Characters of a client's name, as attach.proto says."""


@dataclass(frozen=True)
class Peer:
    """The process at the other end of an attach connection, as the kernel names it."""

    pid: int
    uid: int


@dataclass(eq=False)
class Session:
    """One attached application. The session owns ``arena_fd`` and ``ring``; either may be None.

    ``clients_ring`` are descriptors for the client, to be closed once it has them.
    ``weight`` is its share of a drive beside other sessions, ``requests`` how many of it are in flight,
    ``since`` a ``time.monotonic()``. Whoever sets ``closing`` has the transport end the session.
    """

    session_id: int
    token: str
    client_name: str
    peer: Peer
    arena: ArenaSpace
    arena_fd: int | None
    ring: RingFds | None = None
    clients_ring: RingFds | None = None
    weight: float = 1.0
    requests: int = 0
    since: float = field(default_factory=time.monotonic)
    usage: Usage = field(default_factory=Usage)
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def end_reason(self) -> str:
        """Why what still waits for the session fails."""
        return "an administrator closed the session" if self.closing.is_set() else "the session has ended"

    def close_arena(self) -> None:
        """Close the descriptors; the memory goes when the client and the worker have unmapped it too."""
        if self.arena_fd is not None:
            os.close(self.arena_fd)
            self.arena_fd = None
        if self.ring is not None:
            self.ring.close()
            self.ring = None
        self.close_clients_ring()

    def close_clients_ring(self) -> None:
        """Close the client's ends: they are its own, and closed here it shows when it closes them."""
        if self.clients_ring is not None:
            self.clients_ring.close()
            self.clients_ring = None


class Sessions:
    """The attached sessions. Not thread-safe; nothing here blocks but a look at who is in a group."""

    def __init__(self, limits: Limits) -> None:
        self.drain = Drain()
        self._limits = limits
        self._in_flight = 0
        self._by_token: dict[str, Session] = {}
        self._ids = itertools.count(1)
        self._finished: asyncio.Event | None = None

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_token.values()))

    def apply(self, limits: Limits) -> None:
        """Hold to other limits from now on; nobody loses what they have."""
        self._limits = limits
        for session in self:
            session.weight = limits.weight_of(session.peer.uid)

    def open(self, client_name: str, arena_bytes: int, peer: Peer, ring: bool = False) -> Session:
        """Register a session with a new arena of ``arena_bytes`` rounded up to pages (0: none), and a ring.

        Raises :class:`InvalidInput` for a name that is long or cannot be printed, or a ring without an arena,
        and :class:`QuotaExceeded` above a limit, and for a session with an arena ``Draining``. Others may
        still ask and administer. Raises :class:`NotAllowed` for a user who may not attach.
        """
        if not self._limits.may_attach(peer.uid):
            raise NotAllowed(
                f"user {peer.uid} may not attach; an administrator adds them to attach_users, or to a "
                "group in attach_groups"
            )
        if len(client_name) > MAX_NAME:
            raise InvalidInput(
                f"client_name has {len(client_name)} characters; at most {MAX_NAME} are allowed"
            )
        if not client_name.isprintable():
            # It is shown on administrators' terminals, which control characters would steer.
            raise InvalidInput(f"client_name {client_name!r} has characters that cannot be printed")
        if ring and not arena_bytes:
            raise InvalidInput("a ring is of no use without an arena; ask for both or for none")
        self._check_going_on()
        if arena_bytes:
            self.drain.check()
        limits = self._limits
        if arena_bytes > limits.arena_limit:
            raise QuotaExceeded(
                f"an arena of {format_bytes(arena_bytes)} exceeds arena_limit, "
                f"{format_bytes(limits.arena_limit)}; ask for less, or raise it"
            )
        if len(self._by_token) >= limits.session_limit:
            raise QuotaExceeded(
                f"{limits.session_limit} sessions are attached already; end some, or raise session_limit"
            )
        if sum(1 for _ in self._of_user(peer.uid)) >= limits.user_session_limit:
            raise QuotaExceeded(
                f"{limits.user_session_limit} sessions of this user are attached already; end some, or raise "
                "user_session_limit"
            )
        session_id = next(self._ids)
        fd = create_arena(arena_bytes, f"hillinfer-arena-{session_id}") if arena_bytes else None
        # The session's own number as generation: a region kept from an earlier session is recognised.
        arena = ArenaSpace(-(-arena_bytes // PAGE) * PAGE, session_id & 0xFFFFFFFF)
        session = Session(session_id, secrets.token_urlsafe(32), client_name, peer, arena, fd)
        if ring:
            try:
                session.ring, session.clients_ring = create_ring(f"hillinfer-ring-{session_id}")
            except BaseException:
                session.close_arena()
                raise
        session.weight = limits.weight_of(peer.uid)
        self._by_token[session.token] = session
        return session

    @contextmanager
    def request(self, session: Session) -> Iterator[None]:
        """Count what happens inside as a request in flight; raises as :meth:`begin`."""
        self.begin(session)
        try:
            yield
        finally:
            self.end(session)

    def begin(self, session: Session) -> None:
        """Count a request in flight until :meth:`end`.

        Raises :class:`QuotaExceeded` above a limit, and :class:`DaemonUnavailable` after :meth:`finish`.
        """
        self._check_going_on()
        users, uid = 0, session.peer.uid
        for each in self._by_token.values():
            if each.peer.uid == uid:
                users += each.requests
        for what, count, limit in (
            ("session", session.requests, self._limits.session_request_limit),
            ("user", users, self._limits.user_request_limit),
        ):
            if count >= limit:
                raise QuotaExceeded(
                    f"{count} requests of this {what} are in flight already; wait for some to finish, "
                    f"or raise {what}_request_limit"
                )
        session.requests += 1
        self._in_flight += 1

    def end(self, session: Session) -> None:
        """Count a request in flight as over."""
        session.requests -= 1
        self._in_flight -= 1
        self._look_whether_finished()

    @property
    def idle(self) -> bool:
        """Whether no request is in flight, and :meth:`begin` would let in a ring full of them."""
        limits = self._limits
        return (
            self._in_flight == 0
            and self._finished is None
            and limits.session_request_limit >= ENTRIES
            and limits.user_request_limit >= ENTRIES
        )

    async def finish(self, timeout_s: float) -> bool:
        """Refuse sessions and requests from now on; return whether those in flight ended in ``timeout_s``."""
        self._finished = asyncio.Event()
        self._look_whether_finished()
        try:
            async with asyncio.timeout(timeout_s):
                await self._finished.wait()
        except TimeoutError:
            return False
        return True

    def by_token(self, token: str | None) -> Session:
        """Return the session with ``token``; raises :class:`ForeignToken`."""
        session = self._by_token.get(token or "")
        if session is None:
            raise ForeignToken
        return session

    def check_administrator(self, session: Session) -> None:
        """Raise :class:`NotAllowed` unless the session's user may administer by what is configured now."""
        if not self._limits.may_administer(session.peer.uid):
            raise NotAllowed(
                f"user {session.peer.uid} may not administer the daemon; ask as root, as the daemon's user, "
                "or as a user in one of its admin_groups"
            )

    def seen_by(self, session: Session) -> list[Session]:
        """Return the sessions of the session's user; of everybody for who may administer."""
        uid = session.peer.uid
        return list(self if self._limits.may_administer(uid) else self._of_user(uid))

    def may_read(self, session: Session, durable: Durable) -> bool:
        """Say whether the session's user may begin with a durable context, by the groups they are in now."""
        return self._limits.may_read(session.peer.uid, durable)

    def check_may_share(self, session: Session, gid: int) -> None:
        """Raise :class:`NotAllowed` unless the session's user is in the group, or root."""
        if not self._limits.may_share(session.peer.uid, gid):
            raise NotAllowed(
                f"user {session.peer.uid} is not in group {gid} and may not have it read a context; name a "
                "group of your own"
            )

    def is_open(self, session: Session) -> bool:
        """Say whether the session is still attached."""
        return session.token in self._by_token

    def remove(self, session: Session) -> None:
        """Forget the session: its token is foreign from now on."""
        self._by_token.pop(session.token, None)

    def _check_going_on(self) -> None:
        if self._finished is not None:
            raise DaemonUnavailable("the daemon is stopping; connect anew when it is back")

    def _look_whether_finished(self) -> None:
        if self._finished is not None and not any(session.requests for session in self):
            self._finished.set()

    def _of_user(self, uid: int) -> Iterator[Session]:
        return (session for session in self._by_token.values() if session.peer.uid == uid)
