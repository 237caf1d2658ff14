"""What a client can do to the ring that it shares with the daemon: it harms nobody but itself."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from honest import Honest
from raw_ring import RawRing

from hillinfer_core.ring import Entry, Method, ring_doorbell


@pytest.fixture
def ring(daemon: Path) -> Iterator[RawRing]:
    raw = RawRing(daemon)
    yield raw
    raw.close()


def _block(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)


def test_a_doorbell_that_would_block_the_daemon_does_not(ring: RawRing, honest: Honest) -> None:
    # O_NONBLOCK belongs to the open file: whoever shares that can take it away.
    for fd in (ring.fds.submitted, ring.fds.completed):
        _block(fd)
    _fill(ring.fds.completed)
    ring.submissions.put(Entry(1, Method.Fetch, 0, b""))
    ring_doorbell(ring.fds.submitted)
    ring.submissions.put(Entry(2, Method.Fetch, 0, b""))
    ring_doorbell(ring.fds.submitted)
    for _ in range(3):
        honest.check()


def _fill(completed: int) -> None:
    """Leave no room for another ring of the doorbell, by whatever right there is."""
    with suppress(OSError):
        os.eventfd_write(completed, (1 << 64) - 2)
    with suppress(OSError):
        writing = os.open(f"/proc/self/fd/{completed}", os.O_WRONLY | os.O_NONBLOCK)
        with suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.close(writing)
