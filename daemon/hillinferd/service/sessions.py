"""Sessions: who is attached, by which token, with which arena."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from hillinfer_core.arena import create_arena
from hillinfer_core.errors import ForeignToken, InvalidInput, QuotaExceeded
from hillinfer_core.layout import PAGE
from hillinfer_core.ring import RingFds
from hillinfer_core.units import format_bytes

from ..domain.regions import ArenaSpace

MAX_NAME = 64
"""Characters of a client's name, as attach.proto says."""


@dataclass(frozen=True)
class Peer:
    """The process at the other end of an attach connection, as the kernel names it."""

    pid: int
    uid: int


@dataclass(eq=False)
class Session:
    """One attached application. The session owns ``arena_fd`` and ``ring``; either may be None."""

    session_id: int
    token: str
    client_name: str
    peer: Peer
    arena: ArenaSpace
    arena_fd: int | None
    ring: RingFds | None = None

    def close_arena(self) -> None:
        """Close the descriptors; the memory goes when the client and the worker have unmapped it too."""
        if self.arena_fd is not None:
            os.close(self.arena_fd)
            self.arena_fd = None
        if self.ring is not None:
            self.ring.close()
            self.ring = None


class Sessions:
    """The attached sessions. Not thread-safe; nothing here blocks."""

    def __init__(self, arena_limit: int, session_limit: int) -> None:
        self._arena_limit = arena_limit
        self._session_limit = session_limit
        self._by_token: dict[str, Session] = {}
        self._ids = itertools.count(1)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_token.values()))

    def open(self, client_name: str, arena_bytes: int, peer: Peer, ring: bool = False) -> Session:
        """Register a session with a new arena of ``arena_bytes`` rounded up to pages (0: none), and a ring.

        Raises :class:`InvalidInput` for a long name or a ring without an arena, and :class:`QuotaExceeded`
        above a limit.
        """
        if len(client_name) > MAX_NAME:
            raise InvalidInput(
                f"client_name has {len(client_name)} characters; at most {MAX_NAME} are allowed"
            )
        if ring and not arena_bytes:
            raise InvalidInput("a ring is of no use without an arena; ask for both or for none")
        if arena_bytes > self._arena_limit:
            raise QuotaExceeded(
                f"an arena of {format_bytes(arena_bytes)} exceeds arena_limit, "
                f"{format_bytes(self._arena_limit)}"
            )
        if len(self._by_token) >= self._session_limit:
            raise QuotaExceeded(f"{self._session_limit} sessions are attached already (session_limit)")
        session_id = next(self._ids)
        fd = create_arena(arena_bytes, f"hillinfer-arena-{session_id}") if arena_bytes else None
        # The session's own number as generation: a region kept from an earlier session is recognised.
        arena = ArenaSpace(-(-arena_bytes // PAGE) * PAGE, session_id & 0xFFFFFFFF)
        session = Session(session_id, secrets.token_urlsafe(32), client_name, peer, arena, fd)
        if ring:
            try:
                session.ring = RingFds.create(f"hillinfer-ring-{session_id}")
            except BaseException:
                session.close_arena()
                raise
        self._by_token[session.token] = session
        return session

    def by_token(self, token: str | None) -> Session:
        """Return the session with ``token``; raises :class:`ForeignToken`."""
        session = self._by_token.get(token or "")
        if session is None:
            raise ForeignToken
        return session

    def is_open(self, session: Session) -> bool:
        """Say whether the session is still attached."""
        return session.token in self._by_token

    def remove(self, session: Session) -> None:
        """Forget the session: its token is foreign from now on."""
        self._by_token.pop(session.token, None)
