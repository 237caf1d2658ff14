"""The express where a worker, a client or a session fails or ends while something is under way."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from express_rig import SHAPE, Watched, watched
from raw_client import RawClient, wait_for

from hillinfer_core.errors import (
    DaemonUnavailable,
    DeviceUnavailable,
    HillInferError,
    InvalidInput,
)
from hillinfer_core.layout import PAGE
from hillinfer_core.ring import (
    ENTRIES,
    ENTRY_BYTES,
    Entry,
    Method,
    ring_doorbell,
)


@pytest.fixture
def daemon(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    with watched(runtime_dir, monkeypatch) as found:
        yield found


def test_a_worker_that_dies_meanwhile_is_an_error_at_once(daemon: Watched) -> None:
    one = daemon.connect()
    for _ in range(3):
        one.ask()
    with ThreadPoolExecutor(1) as threads:
        pid = daemon.drive.worker.pid
        os.kill(pid, signal.SIGSTOP)
        asked = one.under_way(threads)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(DeviceUnavailable, match="died and is being restarted"):
            asked.result(60)
    daemon.check_flights()
    with pytest.raises(DeviceUnavailable, match="was lost"):
        one.ask()
    wait_for(lambda: daemon.drive.worker.up, 60)
    one.context = one.fill()
    for _ in range(3):
        one.ask()
    one.session.close()


def test_a_worker_that_hangs_is_replaced(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(runtime_dir, monkeypatch, request_timeout_s=1.5) as daemon:
        one = daemon.connect()
        for _ in range(3):
            one.ask()
        os.kill(daemon.drive.worker.pid, signal.SIGSTOP)
        with pytest.raises(DeviceUnavailable, match=r"did not answer in 1.5 s"):
            one.ask()
        daemon.check_flights()
        one.session.close()


@pytest.mark.parametrize("how", ["closed", "left", "stopped"])
def test_an_end_while_one_is_under_way(daemon: Watched, how: str) -> None:
    one, other = daemon.connect(), daemon.connect()
    one.ask()
    one.ask()
    with ThreadPoolExecutor(1) as threads:
        with daemon.stopped():
            asked = one.under_way(threads)
            if how == "closed":
                sessions = daemon.served.service.sessions
                session = daemon.served.run(lambda: next(iter(sessions)))
                daemon.served.run(session.closing.set)
                # Its ring is at an end then: an answer that comes before is taken.
                wait_for(lambda: daemon.served.run(lambda: session not in list(sessions)), 60)
            elif how == "left":
                one.session._link._connection.shutdown(socket.SHUT_RDWR)
            else:
                finishing = asyncio.run_coroutine_threadsafe(
                    daemon.served.service.sessions.finish(60), daemon.served.loop
                )
                # The one that is under way ends first.
                daemon.served.run(lambda: None)
                assert not finishing.done()
            if how == "left":
                # Before the worker goes on: an answer that comes first is taken.
                with pytest.raises(DaemonUnavailable):
                    asked.result(60)
        if how == "stopped":
            assert len(asked.result(60)) == 2
            assert finishing.result(60)
            with pytest.raises(DaemonUnavailable, match="stopping"):
                one.ask()
        else:
            with pytest.raises(DaemonUnavailable):
                asked.result(60)
            other.ask()
    daemon.check_flights()


@pytest.mark.parametrize("what", ["submitted", "taken", "length", "bells"])
def test_a_client_that_breaks_the_rules_of_a_ring_in_use_is_hung_up_on_alone(
    daemon: Watched, what: str
) -> None:
    one, other = daemon.connect(), daemon.connect()
    for _ in range(3):
        one.ask()
        other.ask()
    expected, counters = other.ask(), one.memory.view(0, (PAGE // 4,), "<u4")
    if what == "submitted":
        counters[0] += 17
        ring_doorbell(one.fds.submitted)
    elif what == "length":
        for slot in range(ENTRIES):
            one.memory.view(PAGE + slot * ENTRY_BYTES + 16, (1,), "<u4")[0] = ENTRY_BYTES
        counters[0] += 1
        ring_doorbell(one.fds.submitted)
    elif what == "taken":
        counters[48] += 100
        with pytest.raises(DaemonUnavailable):
            one.ask()
    else:
        # Nobody listens to the client's doorbell any more.
        deaf = os.open("/dev/null", os.O_RDONLY)
        os.dup2(deaf, one.fds.completed)
        os.close(deaf)
        # Who looks into the ring in time finds the answer there, and is hung up on after it.
        with suppress(HillInferError):
            one.ask()
            assert one.hung_up()
    if what in ("submitted", "length"):
        assert one.hung_up()
    for _ in range(3):
        np.testing.assert_array_equal(other.ask(), expected)
    with RawClient(daemon.directory) as client:
        assert client.open(SHAPE) > 0


def test_a_request_that_changes_while_it_is_read_harms_nobody_else(daemon: Watched) -> None:
    """A thread rewrites layer and tokens of every entry: each is refused, or carried out as it was read."""
    one, other = daemon.connect(), daemon.connect()
    for _ in range(3):
        one.ask()
    expected, stop = other.ask(), threading.Event()
    memory = one.memory

    def rewrite() -> None:
        rng = np.random.default_rng(3)
        while not stop.is_set():
            slot = int(rng.integers(0, ENTRIES)) * ENTRY_BYTES + PAGE + 20
            memory.view(slot, (1,), "<u4")[0] = rng.choice([0, 1, 2, 1 << 31])
            memory.view(slot + 24, (2,), "<u4")[:] = rng.choice([0, 100, 256, 257, 1 << 31], 2)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        for _ in range(300):
            with suppress(InvalidInput):
                one.ask()
            np.testing.assert_array_equal(other.ask(), expected)
    finally:
        stop.set()
        thread.join()
    assert daemon.served.run(lambda: daemon.drive.worker.restarts) == 0
    one.ask()


def test_a_client_that_does_not_listen_as_it_is_refused_is_hung_up_on_alone(daemon: Watched) -> None:
    one, other = daemon.connect(), daemon.connect()
    payload, expected = one.packed(), other.ask()
    other.ask()
    for plan in one.session.questions._plans.values():
        plan.buffers[0].query[...] = np.nan
    deaf = os.open("/dev/null", os.O_RDONLY)
    os.dup2(deaf, one.fds.completed)
    os.close(deaf)
    for ticket in (1000, 1001):  # the second waits in the ring when the first one's refusal cannot be told
        one.ring._submissions.put(Entry(ticket, Method.EvaluatePacked, 30000, payload))
    ring_doorbell(one.fds.submitted)
    assert one.hung_up()
    for _ in range(3):
        np.testing.assert_array_equal(other.ask(), expected)
