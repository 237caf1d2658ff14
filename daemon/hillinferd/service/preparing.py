"""What is done with a new worker before requests are let through."""

from __future__ import annotations

from hillinfer_core.errors import HillInferError

from ..domain.extents import Extent, ExtentAllocator
from ..logs import get_logger
from ..worker import messages
from .sessions import Session, Sessions
from .supervisor import Supervisor

log = get_logger(__name__)

_DISCARD_BYTES = 64 << 30
"""Free space discarded in one request at start: a device may take a while for it. Our choice."""


async def tell_of_arenas(worker: Supervisor, sessions: Sessions) -> None:
    """Have ``worker`` know the arenas of all sessions that are attached when this returns."""
    told: dict[int, Session] = {}
    # Others may attach meanwhile, and find no worker yet: until there is nobody new.
    while new := [each for each in sessions if each.arena_fd and each.session_id not in told]:
        for session in new:
            told[session.session_id] = session
            if session.arena_fd is not None:
                request = messages.AttachArena(session.session_id, session.arena.nbytes)
                await worker.prepare(request, session.arena_fd)
    for session in told.values():
        if not sessions.is_open(session):
            await worker.prepare(messages.DetachArena(session.session_id))


async def discard_free(worker: Supervisor, allocator: ExtentAllocator, drive: str) -> None:
    """Give all free space of the pool back; where that fails its space is kept, which is logged."""
    pieces = [
        Extent(offset, min(_DISCARD_BYTES, free.end - offset))
        for free in allocator.free_ranges()
        for offset in range(free.offset, free.end, _DISCARD_BYTES)
    ]
    for piece in pieces:
        try:
            await worker.prepare(messages.Discard([piece]))
        except HillInferError as error:
            # Nobody can read what they did not write.
            log.warning("free space was not discarded", drive=drive, error=error)
            return
