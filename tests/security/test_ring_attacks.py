"""What a client can do to the ring that it shares with the daemon: it harms nobody but itself."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from honest import Honest
from raw_ring import RawRing

from hillinfer_core.layout import PAGE
from hillinfer_core.ring import ENTRY_BYTES, RING_BYTES, Entry, Method, ring_doorbell


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


def test_entries_and_counters_that_change_while_they_are_read_end_that_session_alone(
    daemon: Path, honest: Honest
) -> None:
    """A thread rewrites the whole ring, or its counters, while the doorbell rings and rings."""
    rng = np.random.default_rng(11)
    hung_up = 0
    for round_ in range(30):
        ring = RawRing(daemon)
        stop = threading.Event()
        entries = np.asarray(ring.memory.buffer(PAGE, RING_BYTES - PAGE))
        counters = np.asarray(ring.memory.buffer(0, PAGE)).view(np.uint32)

        def rewrite(stop: threading.Event = stop, entries: np.ndarray = entries) -> None:
            noise = rng.integers(0, 256, entries.size, np.uint8)
            while not stop.is_set():
                entries[:] = noise
                entries[::ENTRY_BYTES] += 1

        thread = threading.Thread(target=rewrite)
        thread.start()
        try:
            for number in range(1, 12):
                # In the second half a few entries more than there are, at times.
                counters[0] = number if round_ % 2 else int(rng.integers(0, number + 8))
                counters[16 * 3] = int(rng.integers(0, 2)) * number
                with suppress(BrokenPipeError):
                    ring_doorbell(ring.fds.submitted)
            honest.check()
        finally:
            stop.set()
            thread.join()
        ring.connection.setblocking(False)
        with suppress(BlockingIOError):
            hung_up += ring.connection.recv(1) == b""
        ring.close()
    print(f"{hung_up} of 30 sessions ended")
    assert hung_up


def test_doorbells_that_the_client_closes_end_its_session(daemon: Path, honest: Honest) -> None:
    ring = RawRing(daemon)
    os.close(ring.fds.submitted)
    assert ring.hung_up()
    ring.connection.close()

    ring = RawRing(daemon)
    ring.submissions.put(Entry(1, Method.Fetch, 0, b""))
    os.close(ring.fds.completed)
    ring_doorbell(ring.fds.submitted)
    assert ring.hung_up()
    ring.connection.close()


def test_a_doorbell_that_rings_without_end_leaves_time_for_others(ring: RawRing, honest: Honest) -> None:
    stop = threading.Event()

    def ring_on() -> None:
        while not stop.is_set():
            ring_doorbell(ring.fds.submitted)

    thread = threading.Thread(target=ring_on)
    thread.start()
    try:
        seconds = [honest.check() for _ in range(20)]
    finally:
        stop.set()
        thread.join()
    print(f"an evaluation beside it took {max(seconds) * 1e3:.0f} ms at most")
