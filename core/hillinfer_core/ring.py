"""Two rings in shared memory with pipes as doorbells: how requests reach the daemon without gRPC.

As NVMe and io_uring do, the client puts an entry into the submission ring and rings the daemon's doorbell;
the daemon puts the answer into the completion ring and rings the client's. An entry is a message of
proto/hillinfer/v1 in its serialised form, or an evaluation by :mod:`.packed`, at most :data:`PAYLOAD_BYTES`
long; larger ones go by gRPC. What reads and writes the memory is native code (ring.h), which the daemon's
own (hillinferd/service/express.py) shares.

Memory: a page of four counters of 32 bits, each on a cache line of its own, then the entries of both rings.
Counters only grow (modulo 2**32); each is written by one side, which never reads it back: the other side
could have changed it. Entries are copied before they are looked at, for the same reason. Counters order
memory: one says that an entry is there once all of it is. So whoever finds one need not have heard the
doorbell, and clears it before sleeping, not after. Doorbells are pipes and not eventfds because whoever
shares an open file can make it blocking: of a pipe each side has an end of its own.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from . import _native
from .arena import Arena, create_arena
from .errors import InvalidInput, QuotaExceeded
from .layout import PAGE

ENTRIES = 16
"""Entries of each ring; a session has at most as many requests in flight on it. Our choice."""

ENTRY_BYTES = 8192
"""Of an entry, its header included: an evaluation takes about 100 bytes for each sequence. Our choice."""

PAYLOAD_BYTES = ENTRY_BYTES - 20
"""Longest message that an entry takes; before it are ticket, code, timeout and length."""

RING_BYTES = PAGE + 2 * ENTRIES * ENTRY_BYTES
"""Of the shared memory."""

# Outcomes of ring.h
_TOO_LONG, _NOBODY_LISTENS = -1, -2

_RING = (1).to_bytes(8, "little")  # what rings an eventfd, so that clients that take it for one go on


class Method(IntEnum):
    """Code of a submission: which call of the ColdPool service it is."""

    Evaluate = 1
    Append = 2
    Fetch = 3
    EvaluatePacked = 4
    """Evaluate, with request and answer as in :mod:`.packed`."""


class Outcome(IntEnum):
    """Code of a completion: whether its payload is the call's response, or a ``Refused`` of attach.proto."""

    answered = 0
    refused = 1


class Waited(IntEnum):
    """Why no entry came: in time; ever, as the other side has gone; or yet, as there was a signal."""

    deadline = 0
    hung_up = 1
    interrupted = 2


class Entry(NamedTuple):
    """``code`` is a :class:`Method`, in completions an :class:`Outcome`; ``timeout_ms`` is 0 for none."""

    ticket: int
    code: int
    timeout_ms: int
    payload: bytes


@dataclass(frozen=True)
class RingFds:
    """Descriptors of one side of a ring: its memory, its ends of the daemon's doorbell and the client's."""

    memory: int
    submitted: int
    completed: int

    def close(self) -> None:
        """Close the descriptors; a mapping stays until it is gone itself."""
        for fd in (self.memory, self.submitted, self.completed):
            os.close(fd)


def create_ring(name: str) -> tuple[RingFds, RingFds]:
    """Create a ring; return the daemon's descriptors and the client's, each to be closed.

    ``name`` shows in /proc only. Raises ``OSError``.
    """
    fds = [create_arena(RING_BYTES, name)]
    try:
        fds.append(os.dup(fds[0]))
        for _ in range(2):
            fds += os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    daemons, clients, submitted_in, submitted_out, completed_in, completed_out = fds
    return RingFds(daemons, submitted_in, completed_out), RingFds(clients, submitted_out, completed_in)


class Producer:
    """The side of one ring that puts entries in. One thread at a time.

    ``number`` is that of the ring in ``memory``, ``at`` what its counters are.
    """

    def __init__(self, memory: Arena, number: int, at: int = 0) -> None:
        self.native = _native.RingProducer(memory.content, number, at)

    def put(self, entry: Entry, doorbell: int = -1) -> None:
        """Put an entry in and ring the ``doorbell`` unless it is -1; never blocks.

        Raises :class:`QuotaExceeded` when the other side has not taken the earlier ones,
        :class:`InvalidInput` for a payload that is too long, or when the other side's counter is senseless,
        and, with the entry put in, ``BrokenPipeError`` if nobody can hear the doorbell any more.
        """
        ticket, code, timeout_ms, payload = entry
        outcome = self.native.put(ticket, code, timeout_ms, payload, doorbell)
        if outcome:
            raise self._error(outcome, payload)

    def _error(self, outcome: int, payload: bytes) -> Exception:
        if outcome == _TOO_LONG:
            return InvalidInput(f"a message of {len(payload)} bytes does not fit in a ring's entry")
        if outcome == _NOBODY_LISTENS:
            return BrokenPipeError("the other side of the ring has gone")
        if outcome == ENTRIES:
            return QuotaExceeded(f"{ENTRIES} entries of the ring wait already; take some first")
        return InvalidInput(f"the ring's counters say that {outcome} of its {ENTRIES} entries are in use")


class Consumer:
    """The side of one ring that takes entries out. One thread at a time.

    ``number`` is that of the ring in ``memory``, ``at`` what its counters are.
    """

    def __init__(self, memory: Arena, number: int, at: int = 0) -> None:
        self.native = _native.RingConsumer(memory.content, number, at)

    def take(self) -> list[Entry]:
        """Return copies of the entries that wait, in order; none when there are none.

        Raises :class:`InvalidInput` when the other side's counter or an entry's length is senseless.
        """
        taken = self.native.take()
        if isinstance(taken, str):
            raise InvalidInput(taken)
        return [Entry._make(each) for each in taken]

    def wait(self, doorbell: int, connection: int, timeout_s: float) -> list[Entry] | Waited:
        """Wait for entries; return copies of all that are there, or why there are none (yet).

        The other side rings ``doorbell``; anything that comes by ``connection`` is its end. Blocks, for
        ``timeout_s`` seconds at most. Raises as :meth:`take`.
        """
        found = self.native.wait(doorbell, connection, timeout_s)
        if isinstance(found, int):
            return Waited(found)
        if isinstance(found, str):
            raise InvalidInput(found)
        return [Entry._make(each) for each in found]


def client_ends(memory: Arena) -> tuple[Producer, Consumer]:
    """Return the client's ends: of submissions and completions."""
    return Producer(memory, 0), Consumer(memory, 1)


def daemon_ends(memory: Arena) -> tuple[Consumer, Producer]:
    """Return the daemon's ends: of submissions and completions."""
    return Consumer(memory, 0), Producer(memory, 1)


def ring_doorbell(fd: int) -> None:
    """Wake whoever waits for the doorbell ``fd``; never blocks. Raises ``OSError`` if nobody can any more."""
    # A pipe that is full has rung already.
    with suppress(BlockingIOError):
        os.write(fd, _RING)


def clear_doorbell(fd: int) -> bool:
    """Take back rings of a doorbell so far; to be called before entries are taken.

    Never blocks. Returns whether the other side can still ring it; rings that were left show again at once.
    """
    try:
        return bool(os.read(fd, PAGE))
    except BlockingIOError:
        return True
