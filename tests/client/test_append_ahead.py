"""An append that is not waited for is there when it is looked for, or is not and can be made again."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from kv_rows import random_kv, random_query
from restartable import Restartable, restartable

from hillinfer import Context, DType, EvaluateItem, Precision, PrivateDaemon, Session, Shape, errors

SHAPE = Shape(layers=12, kv_heads=2, head_dim=64, dtype=DType.float16, precision=Precision.int4)
UNIT = SHAPE.append_unit
TOKENS = 4 * UNIT
KEYS, VALUES = random_kv(SHAPE, TOKENS + UNIT)


def ahead(context: Context, layer: int, first: int = TOKENS, tokens: int = UNIT) -> None:
    context.append_ahead(layer, KEYS[:, first : first + tokens], VALUES[:, first : first + tokens])


def begun(session: Session) -> Context:
    context = session.open_context(SHAPE)
    for layer in range(SHAPE.layers):
        context.append(layer, KEYS[:, :TOKENS], VALUES[:, :TOKENS])
    return context


def assert_holds(context: Context, layer: int, tokens: int) -> None:
    assert context.length(layer) == tokens
    rows = context.fetch_range(layer, 0, tokens)
    np.testing.assert_array_equal(rows[:, :, 0], KEYS[:, :tokens])
    np.testing.assert_array_equal(rows[:, :, 1], VALUES[:, :tokens])


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_it_is_there_when_it_is_looked_for(daemon: PrivateDaemon, session: Session) -> None:
    with begun(session) as context, begun(session) as plain:
        for layer in range(SHAPE.layers):
            plain.append(layer, KEYS[:, TOKENS:], VALUES[:, TOKENS:])
        question = EvaluateItem(
            context, random_query(4, 64), 9, 0, TOKENS, np.empty((SHAPE.kv_heads, 0), np.uint32)
        )
        [expected] = session.evaluate_and_bring(4, [question])
        with stopped(daemon.pid):
            for layer in range(4):
                ahead(context, layer)
            asked = session.ask_ahead(4, [question])
            assert asked is not None
        for layer in range(4, SHAPE.layers):
            ahead(context, layer)
        written = session.counters.written_bytes
        for layer in range(SHAPE.layers):
            assert_holds(context, layer, TOKENS + UNIT)
        assert session.counters.written_bytes > written
        assert context.evaluation_key_bytes == plain.evaluation_key_bytes
        assert context.checksum_bytes == plain.checksum_bytes
        [brought] = session.collect(asked)
        np.testing.assert_array_equal(brought.ids, expected.ids)
        np.testing.assert_array_equal(brought.rows, expected.rows)


def test_what_is_no_request_of_whole_units_is_left_alone(session: Session) -> None:
    with begun(session) as context:
        ahead(context, 0, tokens=UNIT - 1)
        assert context.length(0) == TOKENS
        context.append(1, KEYS[:, TOKENS : TOKENS + 1], VALUES[:, TOKENS : TOKENS + 1])
        ahead(context, 1)
        assert context.length(1) == TOKENS + 1
        ahead(context, 1, TOKENS + 1, UNIT - 1)  # which fills the unit
        for layer in (0, 1):
            assert_holds(context, layer, TOKENS + UNIT * layer)
        with pytest.raises(errors.InvalidInput):
            context.append_ahead(0, KEYS[:1], VALUES[:1])


@pytest.mark.parametrize(("arena_kib", "ring"), [(20, True), (80, True), (8192, False)])
def test_without_room_or_ring_nothing_begins(daemon: PrivateDaemon, arena_kib: int, ring: bool) -> None:
    with Session.connect(daemon.socket, arena_kib << 10, ring=ring) as session:
        context = begun(session)
        for layer in range(3):
            ahead(context, layer)
        held = [context.length(layer) - TOKENS for layer in range(3)]
        assert held == ([UNIT] * 3 if ring and arena_kib == 80 else [0] * 3)
        for layer in range(3):
            assert_holds(context, layer, TOKENS + held[layer])


def test_nothing_begins_beside_a_question_that_has_all_of_the_arena(daemon: PrivateDaemon) -> None:
    """Its rows reach into the part where appends lie."""
    tokens, nothing = 7 * UNIT, np.full((SHAPE.kv_heads, 1), 0xFFFFFFFF, np.uint32)
    keys, values = random_kv(SHAPE, tokens)
    with Session.connect(daemon.socket, SHAPE.kv_heads * tokens * SHAPE.row_bytes + (8 << 10)) as session:
        context = begun(session)
        context.append(0, keys[:, TOKENS:], values[:, TOKENS:])
        question = EvaluateItem(context, random_query(4, 64), tokens, 0, tokens, nothing)
        with stopped(daemon.pid):
            asked = session.ask_ahead(0, [question])
            assert asked is not None
            ahead(context, 1)
        [brought] = session.collect(asked)
        expected = context.fetch_range(0, 0, tokens)
        np.testing.assert_array_equal(brought.rows.reshape(expected.shape), expected)
        assert_holds(context, 1, TOKENS)


def test_what_fails_is_raised_by_the_append_that_is_waited_for(session: Session) -> None:
    with begun(session) as context:
        bad = KEYS[:, :UNIT].copy()
        bad[0, 3, 5] = np.nan
        context.append_ahead(0, bad, bad)
        ahead(context, 1)
        assert context.length(0) == TOKENS
        with pytest.raises(errors.InvalidInput, match="finite"):
            context.append(0, bad, bad)
        assert_holds(context, 0, TOKENS)
        assert_holds(context, 1, TOKENS + UNIT)


def test_no_answer_in_time_ends_the_use_of_the_arena(daemon: PrivateDaemon) -> None:
    with Session.connect(daemon.socket, timeout_s=1) as session:
        context = begun(session)
        with stopped(daemon.pid):
            ahead(context, 0)
            assert context.length(0) == TOKENS
        with pytest.raises(errors.DaemonUnavailable, match="may still be in use"):
            context.append(0, KEYS[:, TOKENS:], VALUES[:, TOKENS:])


@pytest.fixture
def restarted() -> Iterator[Restartable]:
    with tempfile.TemporaryDirectory(prefix="hd-") as directory, restartable(Path(directory)) as running:
        yield running


@pytest.mark.parametrize("kept", [True, False])
def test_a_daemon_that_dies_meanwhile_leaves_it_to_be_made_again(restarted: Restartable, kept: bool) -> None:
    keep_bytes = (64 << 20) * kept
    with Session.connect(restarted.socket, timeout_s=20, restart_s=20, keep_bytes=keep_bytes) as session:
        context = begun(session)
        ahead(context, 1)
        assert context.length(1) == TOKENS + UNIT
        assert restarted.process is not None
        restarted.process.send_signal(signal.SIGSTOP)
        ahead(context, 0)
        restarted.restart(signal.SIGKILL)
        assert context.length(0) == TOKENS
        if not kept:
            with pytest.raises(errors.ContextLost):
                context.append(0, KEYS[:, TOKENS:], VALUES[:, TOKENS:])
            return
        context.append(0, KEYS[:, TOKENS:], VALUES[:, TOKENS:])
        for layer in (0, 1):
            assert_holds(context, layer, TOKENS + UNIT)
        assert_holds(context, 2, TOKENS)


def test_it_may_be_under_way_when_the_context_or_the_session_ends(daemon: PrivateDaemon) -> None:
    with Session.connect(daemon.socket) as session:
        context, other = begun(session), begun(session)
        with stopped(daemon.pid):
            ahead(context, 0)
        context.close()
        assert_holds(other, 0, TOKENS)
        with stopped(daemon.pid):
            ahead(other, 0)
            session.close()
        assert other.length(0) == TOKENS
