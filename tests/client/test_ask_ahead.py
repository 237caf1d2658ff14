"""An evaluation asked for ahead brings what one that is waited for does, whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
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


def test_no_answer_in_time_ends_the_use_of_the_arena(daemon: PrivateDaemon) -> None:
    with Session.connect(daemon.socket, timeout_s=1) as session, session.open_context(SHAPE) as context:
        fill(context)
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            first, second = (ask(session, 0, [item(context, seed)]) for seed in range(2))
            with pytest.raises(errors.DaemonUnavailable, match="may still be in use"):
                session.evaluate_and_bring(0, [item(context)])
            for asked in (first, second):
                with pytest.raises(errors.DeadlineExceeded):
                    session.collect(asked)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        with pytest.raises(errors.DaemonUnavailable, match="may still be in use"):
            session.collect(ask(session, 0, [item(context)]))


def test_an_interrupted_wait_ends_the_use_of_the_arena(session: Session, monkeypatch: Any) -> None:
    context = session.open_context(SHAPE)
    fill(context)
    asked = ask(session, 0, [item(context)])
    assert session._link is not None

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(session._link, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.collect(asked)
    with pytest.raises(errors.DaemonUnavailable, match="may still be in use"):
        session.collect(asked)


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
