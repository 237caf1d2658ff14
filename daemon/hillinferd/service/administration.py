"""What an administrator does: drain, close a session, change the cards of the drives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hillinfer_core.errors import InvalidInput

from ..cec.loader import Status
from ..logs import get_logger
from ..worker import messages
from .drive import Drive
from .sessions import Session, Sessions

log = get_logger(__name__)


@dataclass(frozen=True)
class CardState:
    """Bitstreams of a drive's card, and how many open contexts forbid a change."""

    drive: Drive
    status: Status
    contexts: int


class Administration:
    """For root, the daemon's own user and ``admin_groups``; all methods belong to one event loop.

    ``name`` is a drive's; empty for the only one with a card. Every method raises ``NotAllowed``; those
    of cards :class:`InvalidInput` for a drive that is not there or has no card, ``DeviceUnavailable`` while
    its worker is restarted, and what :class:`~hillinferd.cec.loader.Loader` does.
    """

    def __init__(self, drives: Sequence[Drive], sessions: Sessions) -> None:
        self._drives = drives
        self._sessions = sessions

    def drain(self, session: Session, on: bool) -> list[Session]:
        """Refuse new sessions and contexts, or take them in again; return the sessions that go on."""
        self._sessions.check_administrator(session)
        self._sessions.drain.set(on)
        return [each for each in self._sessions if each.arena_fd is not None]

    def close_session(self, session: Session, session_id: int) -> Session:
        """Have a session ended, and all it holds freed soon after; return it.

        Raises :class:`InvalidInput` if there is none of that number.
        """
        self._sessions.check_administrator(session)
        for each in self._sessions:
            if each.session_id == session_id:
                log.warning("session closed by an administrator", session=session_id, by=session.peer.uid)
                each.closing.set()
                return each
        raise InvalidInput(f"there is no session {session_id}; hillinferctl sessions lists them")

    async def status(self, session: Session, name: str, deadline: float | None) -> list[CardState]:
        """Ask the card of one drive, or with an empty name every card, of which there may be none."""
        self._sessions.check_administrator(session)
        drives = [self._named(name)] if name else self._with_card
        return [
            CardState(drive, *await drive.configure(session, lambda _: messages.CecStatus(), deadline))
            for drive in drives
        ]

    async def load(self, session: Session, name: str, bitstream: str, deadline: float | None) -> CardState:
        """Load a bitstream of the catalogue, and prove it."""
        self._sessions.check_administrator(session)
        drive = self._named(name)
        state = await drive.configure(
            session, lambda contexts: messages.CecLoad(bitstream, contexts), deadline
        )
        return CardState(drive, *state)

    async def rollback(self, session: Session, name: str, deadline: float | None) -> CardState:
        """Go back to the bitstream that was good before."""
        self._sessions.check_administrator(session)
        drive = self._named(name)
        return CardState(drive, *await drive.configure(session, messages.CecRollback, deadline))

    @property
    def _with_card(self) -> list[Drive]:
        return [drive for drive in self._drives if drive.card]

    def _named(self, name: str) -> Drive:
        if not name:
            found = self._with_card
            if len(found) == 1:
                return found[0]
            names = ", ".join(drive.name for drive in found)
            raise InvalidInput(
                f"several drives have a card; name one of {names}"
                if found
                else "no drive has a card: set driver and card in the daemon's configuration"
            )
        for drive in self._drives:
            if drive.name == name:
                return drive
        raise InvalidInput(
            f"there is no drive {name!r:.80}; drives are {', '.join(drive.name for drive in self._drives)}"
        )
