"""What the express carries, and what it leaves to the queue: always the same answers, accounts and errors."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from raw_client import RawClient, wait_for
from service_thread import Served, drive_settings, served

from hillinfer import Context, DType, EvaluateItem, Precision, Session, Shape
from hillinfer.ring import RingTransport, Submitted
from hillinfer_core.arena import Arena
from hillinfer_core.errors import (
    DaemonUnavailable,
    DeadlineExceeded,
    DeviceUnavailable,
    HillInferError,
    InvalidInput,
)
from hillinfer_core.layout import PAGE
from hillinfer_core.packed import ask_again
from hillinfer_core.protocol import attach_socket
from hillinfer_core.ring import (
    ENTRIES,
    ENTRY_BYTES,
    RING_BYTES,
    Entry,
    Method,
    Outcome,
    ring_doorbell,
)
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinferd.metrics.recorder import Recorder
from hillinferd.rpc.ring import RingServer
from hillinferd.service.drive import Drive
from hillinferd.service.express import Flight, Run
from hillinferd.service.limits import Limits
from hillinferd.service.work_queue import Piece

SHAPE = Shape(2, 2, 64, DType.float16, Precision.int8)
HELD = np.full((2, 4), 0xFFFFFFFF, np.uint32)
QUERY = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)


@dataclass
class Watched:
    """A daemon of the test's own: what the express carried, the queue's pieces, what those took over."""

    served: Served
    directory: Path
    runs: list[Run] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)

    @property
    def drive(self) -> Drive:
        return self.served.service.drives[0]

    @property
    def carried(self) -> int:
        return self.served.run(lambda: sum(len(run.seconds) for run in self.runs))

    @property
    def evaluated(self) -> int:
        """Evaluations that took a turn of the queue."""
        return self.served.run(lambda: sum(piece.operation == "evaluate" for piece in self.pieces))

    def check_flights(self) -> None:
        """One was taken over, unless something else of the loop broke in and all went through the queue."""
        assert len(self.flights) == 1 or self.evaluated > 1

    def connect(self) -> Asking:
        return Asking(Session.connect(attach_socket(self.directory), restart_s=0.2))

    @contextmanager
    def stopped(self) -> Iterator[int]:
        """Have the worker stand still."""
        pid = self.drive.worker.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield pid
        finally:
            os.kill(pid, signal.SIGCONT)


class Asking:
    """A session with a context that asks the same again and again."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.context = self.fill()

    def fill(self) -> Context:
        context = self.session.open_context(SHAPE)
        rng = np.random.default_rng(0)
        for layer in range(SHAPE.layers):
            keys, values = rng.standard_normal((2, 2, 256, 64)).astype(np.float16)
            context.append(layer, keys, values)
        return context

    def ask(self, layer: int = 0, first: int = 0, end: int = 256, query: np.ndarray = QUERY) -> np.ndarray:
        item = EvaluateItem(self.context, query, 8, first, end, HELD)
        return self.session.evaluate_and_bring(layer, [item])[0].ids

    @property
    def ring(self) -> RingTransport:
        return self.session._link._ring

    def packed(self) -> bytes:
        """Ask a few times, and return what went into the ring."""
        found: list[bytes] = []
        submit = self.ring.submit

        def spied(method: Method, payload: bytes, timeout_s: float) -> Submitted:
            found.append(payload)
            return submit(method, payload, timeout_s)

        self.ring.submit = spied
        self.ask()
        self.ask()
        self.ring.submit = submit
        return found[-1]

    def submit_and_wait(self, payloads: list[bytes]) -> list[Entry]:
        submitted = [self.ring.submit(Method.EvaluatePacked, payload, 30) for payload in payloads]
        return [self.ring.answer(each) for each in submitted]

    def taken(self, submitted: Submitted) -> bool:
        """Whether the daemon has taken a request, of a session that has submitted all by the ring."""
        return int(self.memory.view(64, (1,), "<u4")[0]) == submitted.ticket

    def under_way(self, threads: ThreadPoolExecutor) -> Future[np.ndarray]:
        """Ask, and return when the daemon has taken the request: its counter says so."""
        counter = self.memory.view(64, (1,), "<u4")
        before = int(counter[0])
        asked = threads.submit(self.ask)
        wait_for(lambda: int(counter[0]) != before, 60)
        return asked

    @property
    def memory(self) -> Arena:
        return Arena(self.fds.memory, RING_BYTES)

    @property
    def fds(self):
        return self.session._link._ring._fds

    def hung_up(self) -> bool:
        self.session._link._connection.settimeout(60)
        return self.session._link._connection.recv(1) == b""


@pytest.fixture
def daemon(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    with watched(runtime_dir, monkeypatch) as found:
        yield found


@contextmanager
def watched(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, request_timeout_s: float = 60.0
) -> Iterator[Watched]:
    with served(runtime_dir, drive_settings("one", runtime_dir / "pool", request_timeout_s)) as service:
        found = Watched(service, runtime_dir)
        go_on = RingServer.go_on

        def spied(self: RingServer, flight: Flight) -> None:
            found.flights.append(flight)
            go_on(self, flight)

        monkeypatch.setattr(RingServer, "go_on", spied)
        service.run(
            lambda: service.service.observe(
                lambda _, piece, __: found.pieces.append(piece), lambda _, run: found.runs.append(run)
            )
        )
        yield found


def test_what_repeats_is_carried_with_the_same_answers_and_accounts(daemon: Watched) -> None:
    one = daemon.connect()
    (session,) = daemon.served.run(lambda: list(daemon.served.service.sessions))

    def accounts() -> np.ndarray:
        usage, traffic = session.usage, session.usage.traffic
        counts = (usage.winners, usage.missing, usage.pieces, traffic.read, traffic.evaluated, traffic.reads)
        drive = daemon.drive
        return np.array([*counts, drive.queue.done, drive.usage.pieces, drive.usage.winners])

    def asked() -> list[np.ndarray]:
        return [one.ask(layer, 0, end) for layer in (0, 1) for end in (256, 100)]

    before = daemon.served.run(accounts)
    expected = asked()
    once = daemon.served.run(accounts)
    assert daemon.evaluated == 1
    for _ in range(3):
        for mine, other in zip(asked(), expected, strict=True):
            np.testing.assert_array_equal(mine, other)
    np.testing.assert_array_equal(daemon.served.run(accounts) - once, 3 * (once - before))
    # All but what something else of the loop broke in on.
    assert daemon.carried + daemon.evaluated == 16
    assert daemon.carried > 4
    one.session.close()


def test_what_may_not_be_is_refused_and_carried_on_with(daemon: Watched) -> None:
    one = daemon.connect()
    one.ask()
    for first, end, layer, said in (
        (0, 257, 0, "are not a range"),
        (9, 9, 0, "are not a range"),
        (10, 4, 1, "are not a range"),
        (0, 7, 0, "k is 8"),
        (0, 8, 2, "layer 2 does not exist"),
        (0, 8, 1 << 31, "layer 2147483648 does not exist"),
    ):
        one.ask()
        with pytest.raises(InvalidInput, match=said):
            one.ask(layer, first, end)
    with pytest.raises(InvalidInput, match="NaN"):
        one.ask(query=QUERY * np.nan)
    # The worker's refusal of one that was carried is Python's to tell.
    assert sum(bool(flight.answer) for flight in daemon.flights) == 1 or daemon.evaluated > 1
    one.ask()
    one.session.close()


def test_a_change_is_seen_at_once(daemon: Watched) -> None:
    one = daemon.connect()
    for _ in range(3):
        one.ask()
    rows = np.ones((2, 64, 64), np.float16)
    with pytest.raises(InvalidInput, match="are not a range"):
        one.ask(0, 0, 320)
    one.context.append(0, rows, rows)
    one.ask(0, 0, 320)
    with pytest.raises(InvalidInput, match="are not a range"):
        one.ask(1, 0, 320)
    one.ask()
    # Nobody has any request in flight, but not one may be: what is carried is held to limits too.
    daemon.served.run(lambda: daemon.served.service.apply_limits(Limits(session_request_limit=0)))
    with pytest.raises(HillInferError, match="raise session_request_limit"):
        one.ask()
    daemon.served.run(lambda: daemon.served.service.apply_limits(Limits()))
    one.ask()
    other = one.fill()
    one.context.close()
    with pytest.raises(HillInferError, match="not an open context"):
        one.ask()
    one.context = other
    one.ask()
    one.session.close()


def test_what_comes_meanwhile_waits_in_the_queue_and_both_are_answered(daemon: Watched) -> None:
    one, two = daemon.connect(), daemon.connect()
    expected = [one.ask(), two.ask(1)]
    one.ask()
    with ThreadPoolExecutor(3) as threads:
        with daemon.stopped():
            first = one.under_way(threads)
            second = threads.submit(two.ask, 1)
            wait_for(lambda: daemon.served.run(lambda: daemon.drive.queue.busy), 60)
            wait_for(lambda: daemon.served.run(lambda: daemon.drive.queue.waiting) == 1, 60)
            assert daemon.served.run(lambda: sum(s.requests for s in daemon.served.service.sessions)) == 2
        np.testing.assert_array_equal(first.result(60), expected[0])
        np.testing.assert_array_equal(second.result(60), expected[1])
    daemon.check_flights()
    taken = [piece for piece in daemon.pieces if piece.operation == "evaluate"][-2:]
    # The one that was under way is charged from when it began, and the other waited for that.
    assert taken[0].service_s > 0
    assert taken[1].queue_s > 0
    for asking in (one, two):
        asking.ask()
        asking.session.close()


def test_several_of_one_session_are_carried_in_order(daemon: Watched) -> None:
    one = daemon.connect()
    asked = one.packed()
    assert [entry.code for entry in one.submit_and_wait([asked] * 5)] == [Outcome.answered] * 5
    carried = daemon.carried
    with daemon.stopped():
        submitted = [one.ring.submit(Method.EvaluatePacked, asked, 30) for _ in range(ENTRIES - 1)]
        one.ring.submit(Method.EvaluatePacked, asked, 30)
    for each in reversed(submitted):
        assert one.ring.answer(each).code == Outcome.answered
    assert daemon.carried > carried + 2
    (run, *_) = [run for run in daemon.runs if len(run.seconds) > 2]
    # Each but the first waited for those before it.
    assert all(waited > 0 for waited in run.waited[1:])
    one.session.close()


def test_what_is_not_carried_keeps_its_place_among_what_is(daemon: Watched) -> None:
    """An append between two evaluations, of which the second ranks what it appends."""
    one = daemon.connect()
    asked = one.packed()
    region = pb.Region(
        offset=1 << 20, length=2 * 64 * 2 * 64 * 2, generation=one.session._link.staging().generation
    )
    append = pb.AppendRequest(
        context_id=one.context.context_id, layer=0, first_token=256, tokens=64, rows=region
    ).SerializeToString()
    longer = ask_again(bytearray(asked), 0, [(0, 320)])
    with daemon.stopped():
        requests = [asked, asked, longer, append, longer, asked]
        submitted = [
            one.ring.submit(Method.Append if each is append else Method.EvaluatePacked, each, 30)
            for each in requests
        ]
    answers = [one.ring.answer(each) for each in submitted]
    refused, done = Outcome.refused, Outcome.answered
    assert [answer.code for answer in answers] == [done, done, refused, done, done, done]
    one.session.close()


def test_a_deadline_that_passes_behind_what_is_carried(daemon: Watched) -> None:
    one = daemon.connect()
    asked = one.packed()
    with daemon.stopped():
        first = one.ring.submit(Method.EvaluatePacked, asked, 30)
        wait_for(lambda: one.taken(first), 60)
        second = one.ring.submit(Method.EvaluatePacked, asked, 0.05)
        with pytest.raises(DeadlineExceeded):
            one.ring.answer(second)
        time.sleep(0.2)  # the daemon counts from when it saw the request
    assert one.ring.answer(first).code == Outcome.answered
    third = one.ring.submit(Method.EvaluatePacked, asked, 30)
    assert one.ring.answer(third).code == Outcome.answered
    late = one.ring.answer(second._replace(deadline=third.deadline))
    assert late.code == Outcome.refused
    assert b"deadline passed" in late.payload
    one.session.close()


def test_a_competitor_goes_before_what_a_session_has_waiting(daemon: Watched) -> None:
    one, two = daemon.connect(), daemon.connect()
    asked, others = one.packed(), two.packed()
    with daemon.stopped():
        mine = [one.ring.submit(Method.EvaluatePacked, asked, 30)]
        wait_for(lambda: one.taken(mine[0]), 60)
        mine += [one.ring.submit(Method.EvaluatePacked, asked, 30) for _ in range(3)]
        other = two.ring.submit(Method.EvaluatePacked, others, 30)
        wait_for(lambda: daemon.served.run(lambda: daemon.drive.queue.waiting) == 4, 60)
    for each in mine:
        assert one.ring.answer(each).code == Outcome.answered
    assert two.ring.answer(other).code == Outcome.answered
    turns = [piece.flow for piece in daemon.pieces if piece.operation == "evaluate"][-5:]
    sessions = daemon.served.run(lambda: list(daemon.served.service.sessions))
    # What was under way, and then the competitor, who has had nothing yet.
    assert [sessions.index(flow) for flow in turns] == [0, 1, 0, 0, 0]
    one.session.close()
    two.session.close()


def test_of_several_sessions_each_is_answered_and_accounted_once(daemon: Watched) -> None:
    askings = [daemon.connect() for _ in range(3)]
    expected = [asking.ask() for asking in askings]
    counts = [1, 1, 1]
    stop = threading.Event()

    def keep_asking(number: int) -> None:
        while not stop.is_set():
            np.testing.assert_array_equal(askings[number].ask(), expected[number])
            counts[number] += 1

    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(keep_asking, number) for number in range(3)]
        wait_for(lambda: min(counts) > 100, 60)
        stop.set()
        for call in calls:
            call.result(60)
    usages = daemon.served.run(lambda: [each.usage for each in daemon.served.service.sessions])
    assert [usage.winners for usage in usages] == [count * 2 * 8 for count in counts]
    assert daemon.carried + daemon.evaluated == sum(counts)
    for asking in askings:
        asking.session.close()


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
                session = daemon.served.run(lambda: next(iter(daemon.served.service.sessions)))
                daemon.served.run(session.closing.set)
            elif how == "left":
                one.session._link._connection.shutdown(socket.SHUT_RDWR)
            else:
                finishing = asyncio.run_coroutine_threadsafe(
                    daemon.served.service.sessions.finish(60), daemon.served.loop
                )
                # The one that is under way ends first.
                daemon.served.run(lambda: None)
                assert not finishing.done()
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
        with pytest.raises(HillInferError):
            one.ask()
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


def test_a_recorder_counts_runs_as_it_counts_pieces(daemon: Watched) -> None:
    recorder = Recorder()
    daemon.served.run(lambda: daemon.served.service.observe(recorder.observe, recorder.observe_run))
    one = daemon.connect()
    for _ in range(20):
        one.ask()
    one.session.close()

    def counted() -> float:
        return sum(
            sample.value
            for family in recorder.collect()
            for sample in family.samples
            if sample.name == "hillinferd_service_seconds_count" and sample.labels["operation"] == "evaluate"
        )

    wait_for(lambda: daemon.served.run(counted) == 20, 60)
