"""What the express carries, and what it leaves to the queue: always the same answers, accounts and errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from express_rig import QUERY, Watched, watched
from raw_client import wait_for

from hillinfer_core.errors import (
    DeadlineExceeded,
    HillInferError,
    InvalidInput,
)
from hillinfer_core.packed import ask_again
from hillinfer_core.ring import (
    ENTRIES,
    Method,
    Outcome,
)
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinferd.metrics.recorder import Recorder
from hillinferd.service.limits import Limits


@pytest.fixture
def daemon(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    with watched(runtime_dir, monkeypatch) as found:
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
