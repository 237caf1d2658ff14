"""A daemon that is killed or stopped and started again: sessions go on, or say what they have lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import restart_reader
from restart_reader import LABELS, SHAPE, read
from restartable import Restartable
from restarting import (
    ENDS,
    KEYS,
    KILLED_OR_LONG,
    TOKENS,
    UNIT,
    VALUES,
    assert_same,
    check,
    fill,
    item,
    ranked,
    write,
)

from hillinfer import Session, errors
from hillinfer.link import Link

READER = Path(restart_reader.__file__)


@pytest.fixture
def by_grpc(daemon: Restartable) -> Iterator[Session]:
    with Session.connect(daemon.socket, timeout_s=20, restart_s=20, ring=False) as connected:
        yield connected


def test_a_context_goes_on_that_began_with_one_whose_writer_was_still_there(
    daemon: Restartable, session: Session
) -> None:
    with (
        Session.connect(daemon.socket) as writing,
        writing.open_context(SHAPE, durable="new", labels=LABELS) as written,
    ):
        fill(written, 0, TOKENS)
        written.save()
        context = session.open_context(SHAPE, base="new", labels=LABELS)
    daemon.restart(signal.SIGKILL)
    check(context)
    context.close()
    session.delete_context("new")


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
