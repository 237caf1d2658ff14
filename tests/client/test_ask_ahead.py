"""An evaluation asked for ahead brings what one that is waited for does, whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kv_rows import random_kv, random_query
from restart_reader import LABELS, SHAPE, read
from restartable import Restartable, restartable

from hillinfer import Context, EvaluateItem, PrivateDaemon, Session, errors
from hillinfer.ahead import Asked
from hillinfer.session import Brought

TOKENS = 40 * SHAPE.append_unit
KEYS, VALUES = random_kv(SHAPE, TOKENS)


@pytest.fixture
def restarted() -> Iterator[Restartable]:
    with tempfile.TemporaryDirectory(prefix="hd-") as directory, restartable(Path(directory)) as running:
        with (
            Session.connect(running.socket) as session,
            session.open_context(SHAPE, durable="book", labels=LABELS) as context,
        ):
            fill(context)
            context.save()
        yield running


def fill(context: Context) -> None:
    for layer in range(SHAPE.layers):
        context.append(layer, KEYS, VALUES)


def item(context: Context, seed: int = 0, held: int = 0) -> EvaluateItem:
    query = random_query(4, SHAPE.head_dim) * np.float32(1 + seed)
    ids = np.tile(np.arange(held, dtype=np.uint32), (SHAPE.kv_heads, 1))
    return EvaluateItem(context, np.roll(query, seed), 20, 4, context.flushed(0), ids)


def assert_same(one: list[Brought], two: list[Brought]) -> None:
    for mine, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(mine.ids, theirs.ids)
        np.testing.assert_array_equal(mine.rows, theirs.rows)
        assert mine.missing_per_head == theirs.missing_per_head
        assert len(mine.rows) == sum(mine.missing_per_head)


def ask(session: Session, layer: int, items: list[EvaluateItem]) -> Asked:
    asked = session.ask_ahead(layer, items)
    assert asked is not None
    return asked


def test_whatever_is_asked_between(session: Session) -> None:
    with session.open_context(SHAPE) as context:
        fill(context)
        items = [[item(context, seed, held=seed) for seed in (n, n + 1)] for n in range(4)]
        expected = [session.evaluate_and_bring(1, each) for each in items]
        read_bytes = session.counters.read_bytes
        first = ask(session, 1, items[0])
        second = ask(session, 1, items[1])
        assert_same(session.evaluate_and_bring(1, items[2]), expected[2])
        third, fourth = ask(session, 1, items[3]), ask(session, 1, items[2])
        rows = context.fetch_range(1, 0, TOKENS)
        np.testing.assert_array_equal(rows[:, :, 0], KEYS)
        session.settle(fourth)
        assert_same(session.collect(third), expected[3])
        for _ in range(2):
            assert_same(session.collect(first), expected[0])
            assert_same(session.collect(second), expected[1])
        assert_same(session.collect(fourth), expected[2])
        assert session.counters.read_bytes > 2 * read_bytes


def test_rows_that_the_arena_has_no_room_for(daemon: PrivateDaemon) -> None:
    with Session.connect(daemon.socket, 20 << 10) as session, session.open_context(SHAPE) as context:
        fill(context)
        items = [item(context, seed) for seed in range(8)]
        [expected, *_] = session.evaluate_and_bring(0, items)
        assert_same(session.collect(ask(session, 0, items[:1])), [expected])


def test_where_one_request_does_not_do_nothing_begins(daemon: PrivateDaemon) -> None:
    for arena, ring, count in ((8 << 20, False, 1), (20 << 10, True, 64), (8 << 20, True, 64)):
        with Session.connect(daemon.socket, arena, ring=ring) as session:
            context = session.open_context(SHAPE)
            fill(context)
            items = [item(context, seed) for seed in range(count)]
            assert session.ask_ahead(0, items) is None
            assert len(session.evaluate_and_bring(0, items)) == count


def test_a_refusal_is_raised_when_it_is_collected(session: Session) -> None:
    with session.open_context(SHAPE) as context:
        fill(context)
        right = item(context)
        expected = session.evaluate_and_bring(0, [right])
        wrong = ask(session, 0, [right._replace(query=right.query * np.nan)])
        assert_same(session.evaluate_and_bring(0, [right]), expected)
        for _ in range(2):
            with pytest.raises(errors.InvalidInput, match="NaN"):
                session.collect(wrong)
        asked = ask(session, 0, [right])
    assert_same(session.collect(asked), expected)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_are_under_way_together(daemon: PrivateDaemon, session: Session, order: tuple[int, int]) -> None:
    with session.open_context(SHAPE) as context:
        fill(context)
        items = [[item(context, seed, held=seed)] for seed in range(3)]
        expected = [session.evaluate_and_bring(0, each) for each in items]
        with stopped(daemon.pid):
            asked = [ask(session, 0, each) for each in items[:2]]
            assert session.waited_s == 0, "nobody has waited for anything"
        third = ask(session, 0, items[2])
        assert session.waited_s > 0
        assert asked[0].brought is not None, "the oldest is kept"
        for number in order:
            assert_same(session.collect(asked[number]), expected[number])
        assert_same(session.collect(third), expected[2])
        assert asked[0].asked_at == asked[0].begun_at < asked[1].asked_at < asked[1].begun_at


@pytest.mark.parametrize("arena_kib", [20, 44, 48, 60, 64, 200])
def test_an_arena_of_any_size_keeps_them_apart(daemon: PrivateDaemon, arena_kib: int) -> None:
    with Session.connect(daemon.socket, arena_kib << 10) as session, session.open_context(SHAPE) as context:
        fill(context)
        items = [[item(context, 2 * n), item(context, 2 * n + 1)] for n in range(4)]
        expected = [session.evaluate_and_bring(0, each) for each in items]
        asked = [session.ask_ahead(0, each) for each in items]
        for each, right, mine in zip(asked, expected, items, strict=True):
            assert_same(session.evaluate_and_bring(0, mine) if each is None else session.collect(each), right)


@pytest.mark.parametrize("wrong", [0, 1])
def test_an_error_of_one_is_not_the_others(session: Session, wrong: int) -> None:
    with session.open_context(SHAPE) as context:
        fill(context)
        right = item(context)
        expected = session.evaluate_and_bring(0, [right])
        queries = [right.query * np.float32(np.nan if number == wrong else 1) for number in range(2)]
        asked = [ask(session, 0, [right._replace(query=query)]) for query in queries]
        assert_same(session.collect(asked[1 - wrong]), expected)
        with pytest.raises(errors.InvalidInput, match="NaN"):
            session.collect(asked[wrong])
        assert_same(session.evaluate_and_bring(0, [right]), expected)


def test_what_changes_contexts_waits_for_both(restarted: Restartable) -> None:
    with Session.connect(restarted.socket) as session:
        context = session.open_context(SHAPE, durable="two under way", labels=LABELS)
        fill(context)
        items = [item(context, seed) for seed in range(2)]
        expected = [session.evaluate_and_bring(0, [each]) for each in items]

        def change(what: Callable[[], object]) -> None:
            with stopped(restarted.pid):
                asked = [ask(session, 0, [each]) for each in items]
            what()
            for each, right in zip(asked, expected, strict=True):
                assert_same(session.collect(each), right)

        change(lambda: context.append(0, KEYS, VALUES))
        assert context.length(0) == 2 * TOKENS
        change(lambda: context.append(1, KEYS, VALUES))
        change(context.save)
        change(lambda: context.fetch_range(0, 0, TOKENS))
        change(context.close)


def test_a_session_that_is_closed_answers_neither(daemon: PrivateDaemon) -> None:
    with Session.connect(daemon.socket) as session:
        context = session.open_context(SHAPE)
        fill(context)
        asked = [ask(session, 0, [item(context, seed)]) for seed in range(2)]
        session.close()
        for each in asked:
            with pytest.raises(errors.HillInferError):
                session.collect(each)


def test_no_answer_in_time_ends_the_use_of_the_arena(daemon: PrivateDaemon) -> None:
    with Session.connect(daemon.socket, timeout_s=1) as session, session.open_context(SHAPE) as context:
        fill(context)
        with stopped(daemon.pid):
            first, second = (ask(session, 0, [item(context, seed)]) for seed in range(2))
            with pytest.raises(errors.DaemonUnavailable, match="may still be in use"):
                session.evaluate_and_bring(0, [item(context)])
            for asked in (first, second):
                with pytest.raises(errors.DeadlineExceeded):
                    session.collect(asked)
        with pytest.raises(errors.DaemonUnavailable, match="may still be in use"):
            session.collect(ask(session, 0, [item(context)]))


def test_an_interrupted_wait_ends_the_use_of_the_arena(session: Session, monkeypatch: Any) -> None:
    context = session.open_context(SHAPE)
    fill(context)
    expected = session.evaluate_and_bring(0, [item(context, 1)])
    asked, other = ask(session, 0, [item(context)]), ask(session, 0, [item(context, 1)])
    assert session._link is not None

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(session._link, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.collect(asked)
    assert_same(session.collect(other), expected)
    with pytest.raises(errors.DaemonUnavailable, match="may still be in use"):
        session.collect(asked)
    with pytest.raises(errors.DaemonUnavailable, match="may still be in use"):
        ask(session, 0, [item(context)])


@pytest.mark.parametrize("noticed", ["by collect", "by another call", "before the restart"])
def test_a_daemon_that_dies_meanwhile_is_asked_again(restarted: Restartable, noticed: str) -> None:
    with Session.connect(restarted.socket, timeout_s=20, restart_s=20) as session:
        context, volatile = read(session), session.open_context(SHAPE)
        fill(volatile)
        expected = session.evaluate_and_bring(0, [item(context)])
        asked = ask(session, 0, [item(context)])
        if noticed == "before the restart":
            session.settle(asked)
        restarted.restart(signal.SIGKILL)
        if noticed == "by another call":
            assert [each.name for each in session.list_contexts()] == ["book"]
        assert_same(session.collect(asked), expected)
        assert_same(session.evaluate_and_bring(0, [item(context)]), expected)
        assert session.restarts == 1
        lost = ask(session, 0, [item(context)])
        restarted.restart(signal.SIGKILL)
        assert_same(session.collect(ask(session, 0, [item(context)])), expected)
        assert_same(session.collect(lost), expected)
        assert session.restarts == 2
        with pytest.raises(errors.ContextLost):
            ask(session, 0, [item(volatile)])


def test_two_that_a_daemon_dies_of_are_both_asked_again(restarted: Restartable) -> None:
    with Session.connect(restarted.socket, timeout_s=20, restart_s=20) as session:
        context = read(session)
        items = [[item(context, seed)] for seed in range(3)]
        expected = [session.evaluate_and_bring(0, each) for each in items]
        for collected in ((0, 1), (1, 0)):
            assert restarted.process is not None
            restarted.process.send_signal(signal.SIGSTOP)
            asked = [ask(session, 0, each) for each in items[:2]]
            restarted.restart(signal.SIGKILL)
            third = ask(session, 0, items[2])
            for number in collected:
                assert_same(session.collect(asked[number]), expected[number])
            assert_same(session.collect(third), expected[2])
        assert session.restarts == 2


def test_what_was_asked_of_a_context_that_is_lost_is_lost(restarted: Restartable) -> None:
    with Session.connect(restarted.socket, timeout_s=20, restart_s=20) as session:
        volatile = session.open_context(SHAPE)
        fill(volatile)
        assert restarted.process is not None
        restarted.process.send_signal(signal.SIGSTOP)
        asked = ask(session, 0, [item(volatile)])
        restarted.restart(signal.SIGKILL)
        with pytest.raises(errors.ContextLost):
            session.collect(asked)
        session.close()
        with pytest.raises(errors.HillInferError):
            session.collect(asked)
