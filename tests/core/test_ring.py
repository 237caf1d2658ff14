"""The ring's two ends on one mapping, and what they make of a mapping that lies."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hillinfer_core.arena import Arena
from hillinfer_core.errors import InvalidInput, QuotaExceeded
from hillinfer_core.ring import (
    ENTRIES,
    ENTRY_BYTES,
    PAYLOAD_BYTES,
    RING_BYTES,
    Consumer,
    Entry,
    Producer,
    Waited,
    client_ends,
    create_ring,
    daemon_ends,
    ring_doorbell,
)


@pytest.fixture
def memory() -> Iterator[Arena]:
    ours, theirs = create_ring("test")
    yield Arena(theirs.memory, RING_BYTES, verify=True)
    ours.close()
    theirs.close()


def entry(number: int, payload: bytes = b"") -> Entry:
    return Entry(number, number % 3, number % 7, payload)


class RingModel(RuleBasedStateMachine):
    """Against a deque: both lanes at once, neither disturbing the other, round and round."""

    def __init__(self) -> None:
        super().__init__()
        self.sides = create_ring("model")
        memory = Arena(self.sides[0].memory, RING_BYTES)
        (submit, collect), (take, complete) = client_ends(memory), daemon_ends(memory)
        self.lanes = ((submit, take, deque()), (complete, collect, deque()))
        self.number = 0

    @rule(lane=st.integers(0, 1), payload=st.binary(max_size=64))
    def put(self, lane: int, payload: bytes) -> None:
        producer, _, waiting = self.lanes[lane]
        self.number += 1
        new = entry(self.number, payload)
        if len(waiting) == ENTRIES:
            with pytest.raises(QuotaExceeded):
                producer.put(new)
        else:
            producer.put(new)
            waiting.append(new)

    @rule(lane=st.integers(0, 1))
    def take(self, lane: int) -> None:
        _, consumer, waiting = self.lanes[lane]
        assert consumer.take() == list(waiting)
        waiting.clear()

    @invariant()
    def nothing_is_lost(self) -> None:
        assert all(len(waiting) <= ENTRIES for _, _, waiting in self.lanes)

    def teardown(self) -> None:
        for side in self.sides:
            side.close()


TestRing = RingModel.TestCase
TestRing.settings = settings(max_examples=30, stateful_step_count=60, deadline=None)


def test_counters_wrap(memory: Arena) -> None:
    memory.view(0, (1,), "<u4")[0] = memory.view(64, (1,), "<u4")[0] = 2**32 - 2
    submit, take = Producer(memory, 0, 2**32 - 2), Consumer(memory, 0, 2**32 - 2)
    entries = [entry(number) for number in range(5)]
    for each in entries:
        submit.put(each)
    assert take.take() == entries
    assert take.take() == []


def test_the_longest_payload_fits_and_no_longer_one(memory: Arena) -> None:
    (submit, _), (take, _) = client_ends(memory), daemon_ends(memory)
    longest = entry(1, b"x" * PAYLOAD_BYTES)
    submit.put(longest)
    submit.put(entry(2))
    assert take.take() == [longest, entry(2)]
    with pytest.raises(InvalidInput, match="does not fit"):
        submit.put(entry(3, b"x" * (PAYLOAD_BYTES + 1)))


def test_a_senseless_counter_is_refused_on_either_side(memory: Arena) -> None:
    (submit, _), (take, _) = client_ends(memory), daemon_ends(memory)
    memory.view(0, (1,), "<u4")[0] = ENTRIES + 1
    with pytest.raises(InvalidInput, match="17 of its 16"):
        take.take()
    memory.view(64, (1,), "<u4")[0] = 1  # taken, though nothing was put
    with pytest.raises(InvalidInput):
        submit.put(entry(1))


def test_a_client_waits_for_entries(memory: Arena) -> None:
    (_, collect), (_, complete) = client_ends(memory), daemon_ends(memory)
    bell, rung = os.pipe2(os.O_NONBLOCK)
    connection, theirs = socket.socketpair()
    with connection, theirs:

        def wait(timeout_s: float = 60.0) -> list[Entry] | Waited:
            return collect.wait(bell, connection.fileno(), timeout_s)

        assert wait(0) is Waited.deadline
        ring_doorbell(rung)  # with nothing to say
        assert wait(0.01) is Waited.deadline
        entries = [entry(number, b"x" * number) for number in (1, 2, 3)]
        for each in entries:
            complete.put(each, rung)
        assert wait() == entries
        assert wait(0.01) is Waited.deadline
        complete.put(entry(5), rung)
        theirs.send(b"end")
        assert wait() == [entry(5)]  # what came before the end counts
        assert wait() is Waited.hung_up
        complete.put(entry(6))
        assert wait() == [entry(6)]  # what is there need not have been heard of
        memory.view(128, (1,), "<u4")[0] += 100
        ring_doorbell(rung)
        with pytest.raises(InvalidInput, match="100 of its 16"):
            wait()
        os.close(bell)
        with pytest.raises(BrokenPipeError):
            complete.put(entry(8), rung)
        os.close(rung)


def test_what_was_heard_of_entries_taken_already_ends_no_wait(memory: Arena) -> None:
    (_, collect), (_, complete) = client_ends(memory), daemon_ends(memory)
    bell, rung = os.pipe2(os.O_NONBLOCK)
    connection, theirs = socket.socketpair()
    with connection, theirs:
        for number in range(3):
            complete.put(entry(number), rung)
            assert collect.wait(bell, connection.fileno(), 60) == [entry(number)]
        assert collect.wait(bell, connection.fileno(), 0.01) is Waited.deadline
        while True:  # as many as the pipe holds
            try:
                os.write(rung, b"x" * 8)
            except BlockingIOError:
                break
        complete.put(entry(3), rung)
        assert collect.wait(bell, connection.fileno(), 60) == [entry(3)]
        with ThreadPoolExecutor(1) as thread:
            waited = thread.submit(collect.wait, bell, connection.fileno(), 60)
            complete.put(entry(4), rung)
            assert waited.result() == [entry(4)]
    os.close(bell)
    os.close(rung)


def test_a_senseless_length_is_refused(memory: Arena) -> None:
    (submit, _), (take, _) = client_ends(memory), daemon_ends(memory)
    submit.put(entry(1))
    length = RING_BYTES - 2 * ENTRIES * ENTRY_BYTES + 16
    memory.view(length, (1,), "<u4")[0] = PAYLOAD_BYTES + 1
    with pytest.raises(InvalidInput, match="bytes"):
        take.take()


def test_the_other_side_never_sees_half_of_a_change(memory: Arena) -> None:
    """Both sides in processes of their own, neither waiting for a doorbell: the counters are all there is."""
    count = 30_000
    producer, consumer = client_ends(memory)[0], daemon_ends(memory)[0]
    child = os.fork()
    if child == 0:
        for number in range(count):
            while True:
                with suppress(QuotaExceeded):
                    producer.put(entry(number))
                    break
        os._exit(0)
    found: list[Entry] = []
    try:
        deadline = time.monotonic() + 60
        while len(found) < count:
            found += consumer.take()
            assert time.monotonic() < deadline
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert [each.ticket for each in found] == list(range(count))
