"""A daemon that is killed or stopped and started again: sessions go on, or say what they have lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kv_rows import random_kv, random_query
from restart_reader import LABELS, SHAPE, read
from restartable import Restartable, restartable

from hillinfer import Context, EvaluateItem, Session, errors
from hillinfer.evaluation import Selection
from hillinfer.link import Link

UNIT = SHAPE.append_unit
TOKENS = 20 * UNIT + 5
KEYS, VALUES = random_kv(SHAPE, TOKENS + 3 * UNIT)
ENDS = [signal.SIGKILL, signal.SIGTERM]
KILLED_OR_LONG = [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
READER = Path(__file__).with_name("restart_reader.py")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Restartable]:
    with tempfile.TemporaryDirectory(prefix="hd-") as directory, restartable(Path(directory)) as running:
        with Session.connect(running.socket) as session:
            write(session, "book")
        yield running


@pytest.fixture
def session(daemon: Restartable) -> Iterator[Session]:
    with Session.connect(daemon.socket, timeout_s=20, restart_s=20) as connected:
        yield connected


@pytest.fixture
def by_grpc(daemon: Restartable) -> Iterator[Session]:
    with Session.connect(daemon.socket, timeout_s=20, restart_s=20, ring=False) as connected:
        yield connected


def write(session: Session, name: str) -> None:
    with session.open_context(SHAPE, durable=name, labels=LABELS) as context:
        fill(context, 0, TOKENS)
        context.save()


def fill(context: Context, first: int, end: int) -> None:
    for layer in range(SHAPE.layers):
        context.append(layer, KEYS[:, first:end], VALUES[:, first:end])


def check(context: Context, end: int = TOKENS) -> None:
    for layer in range(SHAPE.layers):
        assert context.length(layer) == end
        rows = context.fetch_range(layer, 0, end)
        np.testing.assert_array_equal(rows[:, :, 0], KEYS[:, :end])
        np.testing.assert_array_equal(rows[:, :, 1], VALUES[:, :end])


def ranked(context: Context) -> Selection:
    return context.evaluate(1, random_query(4, 64), 9)


def item(context: Context) -> EvaluateItem:
    end = context.flushed(0)
    return EvaluateItem(context, random_query(4, 64), 9, 0, end, np.empty((2, 0), np.uint32))


def assert_same(one: Selection, two: Selection) -> None:
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_array_equal(one.scores, two.scores)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", ["session", "by_grpc"])
def test_a_context_on_a_saved_one_goes_on(
    daemon: Restartable, end: signal.Signals, kind: str, request: pytest.FixtureRequest
) -> None:
    session: Session = request.getfixturevalue(kind)
    context = read(session)
    before, [brought] = ranked(context), session.evaluate_and_bring(0, [item(context)])
    daemon.restart(end)
    assert_same(ranked(context), before)
    [again] = session.evaluate_and_bring(0, [item(context)])
    np.testing.assert_array_equal(again.ids, brought.ids)
    np.testing.assert_array_equal(again.rows, brought.rows)
    assert again.generation == brought.generation
    check(context)
    # Restarted while nothing is asked, and then something else is asked first.
    daemon.restart(end)
    assert [each.name for each in session.list_contexts()] == ["book"]
    check(context)
    fill(context, TOKENS, TOKENS + 2 * UNIT)
    check(context, TOKENS + 2 * UNIT)
    assert session.restarts == 2
    [mine] = [each for each in session.status().sessions if each.session_id == session.session_id]
    assert len(mine.contexts) == 1


@pytest.mark.parametrize("end", KILLED_OR_LONG)
def test_what_waits_in_this_process_is_not_lost(
    daemon: Restartable, session: Session, end: signal.Signals
) -> None:
    context, empty = read(session), session.open_context(SHAPE)
    fill(context, TOKENS, TOKENS + 4)
    fill(empty, 0, 7)
    daemon.restart(end)
    check(context, TOKENS + 4)
    fill(context, TOKENS + 4, TOKENS + UNIT)
    check(context, TOKENS + UNIT)
    fill(empty, 7, TOKENS)
    check(empty)


@pytest.mark.parametrize("end", KILLED_OR_LONG)
def test_what_only_the_daemon_had_is_a_typed_error_and_the_session_goes_on(
    daemon: Restartable, session: Session, end: signal.Signals
) -> None:
    volatile, appended, kept = session.open_context(SHAPE), read(session), read(session)
    fill(volatile, 0, TOKENS)
    fill(appended, TOKENS, TOKENS + 2 * UNIT)
    daemon.restart(end)
    for context in (volatile, appended):
        for _ in range(2):
            for use in (
                lambda each: session.evaluate_and_bring(0, [item(each)]),
                lambda each: session.rank(0, [item(kept), item(each)]),
                lambda each: each.fetch_range(0, 0, 16),
                lambda each: each.fetch(0, np.zeros((2, 3), np.uint32)),
                lambda each: each.append(0, KEYS[:, :1], VALUES[:, :1]),
                ranked,
            ):
                with pytest.raises(errors.ContextLost, match="append them again"):
                    use(context)
    check(kept)
    volatile.close()
    appended.close()
    with session.open_context(SHAPE) as new:
        fill(new, 0, TOKENS)
        check(new)


@pytest.mark.parametrize("end", KILLED_OR_LONG)
def test_a_writer_goes_on_where_it_was(daemon: Restartable, session: Session, end: signal.Signals) -> None:
    name = f"written {end.name}"
    context = session.open_context(SHAPE, durable=name, labels=LABELS)
    fill(context, 0, TOKENS - UNIT)
    daemon.restart(end)
    fill(context, TOKENS - UNIT, TOKENS)
    daemon.restart(end)
    context.save()
    assert context.saved
    daemon.restart(end)
    check(context)
    with session.open_context(SHAPE, base=name, labels=LABELS) as reader:
        check(reader)
    context.close()
    session.delete_context(name)


@pytest.mark.parametrize("end", KILLED_OR_LONG)
def test_rows_that_this_process_keeps_are_appended_again(daemon: Restartable, end: signal.Signals) -> None:
    room = 6 * UNIT * SHAPE.layers * SHAPE.kv_heads * SHAPE.row_bytes
    with Session.connect(daemon.socket, timeout_s=20, restart_s=20, keep_bytes=room) as session:
        volatile, appended, more = session.open_context(SHAPE), read(session), read(session)
        fill(volatile, 0, 4 * UNIT + 3)
        for first in range(TOKENS, TOKENS + 2 * UNIT, 5):
            fill(appended, first, min(first + 5, TOKENS + 2 * UNIT))
        fill(more, TOKENS, TOKENS + 2 * UNIT)
        before = [ranked(volatile), ranked(appended)]
        [brought] = session.evaluate_and_bring(0, [item(appended)])
        for _ in range(2):
            daemon.restart(end)
            assert_same(ranked(volatile), before[0])
            assert_same(ranked(appended), before[1])
            [again] = session.evaluate_and_bring(0, [item(appended)])
            assert again.generation == brought.generation
        check(volatile, 4 * UNIT + 3)
        check(appended, TOKENS + 2 * UNIT)
        fill(volatile, 4 * UNIT + 3, TOKENS)
        check(volatile)
        assert volatile.tail_bytes < room
        daemon.restart(end)
        with pytest.raises(errors.ContextLost, match="append them again"):
            check(volatile)
        check(more, TOKENS + 2 * UNIT)


def test_another_context_of_the_same_name_is_not_taken_for_it(daemon: Restartable, session: Session) -> None:
    write(session, "other")
    context = session.open_context(SHAPE, base="other", labels=LABELS)
    daemon.restart()
    daemon.wait()
    with Session.connect(daemon.socket) as somebody:
        somebody.delete_context("other")
        write(somebody, "other")
    with pytest.raises(errors.ContextLost, match="not what this process knows"):
        check(context)
    daemon.restart()
    daemon.wait()
    with pytest.raises(errors.ContextLost):
        check(context)
    # And one that is gone altogether.
    context = session.open_context(SHAPE, base="other", labels=LABELS)
    daemon.restart()
    daemon.wait()
    with Session.connect(daemon.socket) as somebody:
        somebody.delete_context("other")
    with pytest.raises(errors.ContextLost, match="there is no context 'other'"):
        check(context)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", ["session", "by_grpc"])
def test_restarts_during_calls(
    daemon: Restartable, end: signal.Signals, kind: str, request: pytest.FixtureRequest
) -> None:
    session: Session = request.getfixturevalue(kind)
    context = read(session)
    before = ranked(context)
    turns = 0
    with daemon.restarted_meanwhile(end, 0.3):
        deadline = time.monotonic() + 60
        while turns < 50:
            assert_same(ranked(context), before)
            context.fetch_range(0, 0, TOKENS)
            turns += session.restarts
            assert time.monotonic() < deadline
    check(context)


@pytest.mark.parametrize("end", KILLED_OR_LONG)
def test_a_writer_restarted_during_appends_goes_on_or_says_so(
    daemon: Restartable, session: Session, end: signal.Signals
) -> None:
    name = f"appended {end.name}"
    context = session.open_context(SHAPE, durable=name, labels=LABELS)
    shown = 0
    with daemon.restarted_meanwhile(end, 0.1):
        try:
            while not session.restarts:
                fill(context, shown, shown + UNIT) if shown < TOKENS - UNIT else time.sleep(0.01)
                shown = min(context.length(layer) for layer in range(SHAPE.layers))
                session.status()
        except errors.ContextLost:
            # An append was carried out and not answered: its name says from where to go on.
            context.close()
            context = session.open_context(SHAPE, durable=name, labels=LABELS)
    for layer in range(SHAPE.layers):
        held = context.length(layer)
        context.append(layer, KEYS[:, held:TOKENS], VALUES[:, held:TOKENS])
    check(context)
    context.close()
    session.delete_context(name)


@pytest.mark.parametrize("kind", ["writer", "kept"])
def test_between_two_pieces_of_an_append_no_token_is_written_twice(
    daemon: Restartable, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # An arena that takes a third of the tokens at once.
    arena = 2 * 2 * 64 * 2 * TOKENS // 3
    with Session.connect(
        daemon.socket, arena_bytes=arena, timeout_s=20, restart_s=20, keep_bytes=1 << 20
    ) as session:
        context = session.open_context(SHAPE, durable="pieces" if kind == "writer" else None)
        call, sent = session.call, 0

        def counted(method: str, request: Any) -> Any:
            nonlocal sent
            sent += method == "Append"
            if sent == 2 and method == "Append":
                daemon.restart()
            return call(method, request)

        monkeypatch.setattr(session, "call", counted)
        fill(context, 0, TOKENS)
        assert sent > 2 * SHAPE.layers
        assert session.restarts == 1
        check(context)
        context.close()


def test_an_append_that_was_not_answered_is_told_and_its_name_is_free(
    daemon: Restartable, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, call = session.open_context(SHAPE, durable="unanswered"), session.call
    fill(context, 0, UNIT)

    def unanswered(method: str, request: Any) -> Any:
        if method == "Append" and not session.restarts:
            call(method, request)
            daemon.restart()
        return call(method, request)

    monkeypatch.setattr(session, "call", unanswered)
    with pytest.raises(errors.ContextLost, match="see its length"):
        fill(context, UNIT, 2 * UNIT)
    context.close()
    with session.open_context(SHAPE, durable="unanswered") as context:
        assert [context.length(layer) for layer in range(SHAPE.layers)] == [2 * UNIT, UNIT]
        context.append(1, KEYS[:, UNIT : 2 * UNIT], VALUES[:, UNIT : 2 * UNIT])
        check(context, 2 * UNIT)


def test_an_error_while_contexts_are_opened_again_is_not_the_end_of_the_session(
    daemon: Restartable, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, call, refused = read(session), Link.call, 0

    def busy(self: Link, method: str, request: Any, timeout_s: float) -> Any:
        nonlocal refused
        if method == "OpenContext" and not refused:
            refused += 1
            raise errors.DeviceUnavailable("the drive is restarting; try again in a moment")
        return call(self, method, request, timeout_s)

    daemon.restart()
    monkeypatch.setattr(Link, "call", busy)
    check(context)
    assert refused == 1


def test_a_hung_daemon_that_is_killed_is_attached_to_again(daemon: Restartable) -> None:
    with Session.connect(daemon.socket, timeout_s=20, restart_s=20) as session:
        context = read(session)
        before = ranked(context)
        session.timeout_s = 0.5
        os.kill(daemon.pid, signal.SIGSTOP)
        with pytest.raises(errors.DeadlineExceeded):
            ranked(context)
        with pytest.raises(errors.DaemonUnavailable, match="still be in use"):
            ranked(context)
        daemon.restart()
        session.timeout_s = 20
        assert_same(ranked(context), before)
        check(context)


def test_no_daemon_that_comes_back_is_an_error_and_a_later_one_is_found(daemon: Restartable) -> None:
    with Session.connect(daemon.socket, timeout_s=20, restart_s=0.2) as session:
        context = read(session)
        daemon.end()
        for _ in range(2):
            with pytest.raises(errors.DaemonUnavailable, match="none was back"):
                ranked(context)
        daemon.start()
        daemon.wait()
        check(context)


def wait_for_readers(daemon: Restartable, count: int) -> None:
    """Until each of `count` sessions with a context has been answered something more than it was."""

    def pieces(session: Session) -> dict[int, int]:
        return {each.session_id: each.usage.pieces for each in session.status().sessions if each.contexts}

    deadline = time.monotonic() + 60
    with Session.connect(daemon.socket, arena_bytes=0, timeout_s=20) as onlooker:
        before = now = pieces(onlooker)
        while len(before) < count or not all(now[each] > before[each] for each in before):
            assert time.monotonic() < deadline, daemon.log.read_text()[-4000:]
            time.sleep(0.02)
            now = pieces(onlooker)
            if len(before) < count:
                before = now


def test_several_processes_go_on(daemon: Restartable) -> None:
    readers = [
        subprocess.Popen(
            [sys.executable, str(READER), str(daemon.socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    try:
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
        for end in ENDS:
            daemon.restart(end)
            daemon.wait()
            wait_for_readers(daemon, 3)
        for reader in readers:
            out, _ = reader.communicate("stop\n", timeout=60)
            assert out == "2 restarts, all the same\n"
            assert reader.returncode == 0
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


def test_a_session_that_an_administrator_closed_stays_closed(daemon: Restartable, session: Session) -> None:
    context = read(session)
    check(context)
    command = [sys.executable, "-m", "hillinferd.ctl", "close", str(session.session_id)]
    subprocess.run([*command, "--socket", str(daemon.socket)], check=True, stdout=subprocess.DEVNULL)
    for _ in range(2):
        with pytest.raises(errors.DaemonUnavailable, match="ended this session and goes on"):
            check(context)
    with pytest.raises(errors.DaemonUnavailable):
        session.status()
