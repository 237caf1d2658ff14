"""Two rings in shared memory with pipes as doorbells: how requests reach the daemon without gRPC.

As NVMe and io_uring do, the client puts an entry into the submission ring and rings the daemon's doorbell;
the daemon puts the answer into the completion ring and rings the client's. An entry is a message of
proto/hillinfer/v1 in its serialised form, or an evaluation by :mod:`.packed`, at most :data:`PAYLOAD_BYTES`
long; larger ones go by gRPC.

Memory: a page of four counters of 32 bits, each on a cache line of its own, then the entries of both rings.
Counters only grow (modulo 2**32); each is written by one side, which never reads it back: the other side
could have changed it. Entries are copied before they are looked at, for the same reason. Doorbells order
memory: a system call on both sides lies between writing an entry and reading it. They are pipes and not
eventfds because whoever shares an open file can make it blocking: of a pipe each side has an end of its own.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from .arena import Arena, create_arena
from .errors import InvalidInput, QuotaExceeded
from .layout import PAGE

ENTRIES = 16
"""Entries of each ring; a session has at most as many requests in flight on it. Our choice."""

ENTRY_BYTES = 8192
"""Of an entry, its header included: an evaluation takes about 100 bytes for each sequence. Our choice."""

_HEADER = struct.Struct("<QIII")  # ticket, code, timeout in ms, payload bytes
_LINE = 16  # counters in a cache line
_WRAP = 1 << 32

PAYLOAD_BYTES = ENTRY_BYTES - _HEADER.size
"""Longest message that an entry takes."""

RING_BYTES = PAGE + 2 * ENTRIES * ENTRY_BYTES
"""Of the shared memory."""

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
    """The side of one ring that puts entries in. One thread at a time."""

    def __init__(self, lane: _Lane) -> None:
        self._lane = lane
        self._put = 0

    def put(self, entry: Entry) -> None:
        """Put an entry in; ring the doorbell after it.

        Raises :class:`QuotaExceeded` when the other side has not taken the earlier ones, and
        :class:`InvalidInput` for a payload that is too long, or when the other side's counter is senseless.
        """
        if len(entry.payload) > PAYLOAD_BYTES:
            raise InvalidInput(f"a message of {len(entry.payload)} bytes does not fit in a ring's entry")
        if _ahead(self._put, self._lane.taken()) == ENTRIES:
            raise QuotaExceeded(f"{ENTRIES} entries of the ring wait already; take some first")
        self._lane.write(self._put, entry)
        self._put = (self._put + 1) % _WRAP
        self._lane.set_put(self._put)


class Consumer:
    """The side of one ring that takes entries out. One thread at a time."""

    def __init__(self, lane: _Lane) -> None:
        self._lane = lane
        self._taken = 0

    def take(self) -> list[Entry]:
        """Return copies of the entries that wait, in order; none when there are none.

        Raises :class:`InvalidInput` when the other side's counter or an entry's length is senseless.
        """
        waiting = _ahead(self._lane.put(), self._taken)
        entries = [self._lane.read((self._taken + number) % _WRAP) for number in range(waiting)]
        self._taken = (self._taken + waiting) % _WRAP
        self._lane.set_taken(self._taken)
        return entries


class _Lane:
    """Memory of one ring: its two counters and its entries."""

    def __init__(self, memory: Arena, number: int) -> None:
        # An array stores at once; struct.pack_into writes zeros before, which the other side would see.
        self._counters = memory.buffer(number * 128, 128).cast("I")
        self._entries = memory.buffer(PAGE + number * ENTRIES * ENTRY_BYTES, ENTRIES * ENTRY_BYTES)

    def put(self) -> int:
        return self._counters[0]

    def set_put(self, count: int) -> None:
        self._counters[0] = count

    def taken(self) -> int:
        return self._counters[_LINE]

    def set_taken(self, count: int) -> None:
        self._counters[_LINE] = count

    def write(self, count: int, entry: Entry) -> None:
        at = count % ENTRIES * ENTRY_BYTES
        _HEADER.pack_into(self._entries, at, entry.ticket, entry.code, entry.timeout_ms, len(entry.payload))
        start = at + _HEADER.size
        self._entries[start : start + len(entry.payload)] = entry.payload

    def read(self, count: int) -> Entry:
        at = count % ENTRIES * ENTRY_BYTES
        ticket, code, timeout_ms, length = _HEADER.unpack_from(self._entries, at)
        if length > PAYLOAD_BYTES:
            raise InvalidInput(f"an entry of the ring says that it holds {length} bytes")
        start = at + _HEADER.size
        return Entry(ticket, code, timeout_ms, bytes(self._entries[start : start + length]))


def client_ends(memory: Arena) -> tuple[Producer, Consumer]:
    """Return the client's ends: of submissions and completions."""
    return Producer(_Lane(memory, 0)), Consumer(_Lane(memory, 1))


def daemon_ends(memory: Arena) -> tuple[Consumer, Producer]:
    """Return the daemon's ends: of submissions and completions."""
    return Consumer(_Lane(memory, 0)), Producer(_Lane(memory, 1))


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


def _ahead(put: int, taken: int) -> int:
    ahead = (put - taken) % _WRAP
    if ahead > ENTRIES:
        raise InvalidInput(f"the ring's counters say that {ahead} of its {ENTRIES} entries are in use")
    return ahead
