"""A daemon that is started again while a context is written: no row is lost unsaid, none is written twice."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest
from restart_reader import LABELS, SHAPE, read
from restartable import Restartable
from restarting import (
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
)

from hillinfer import Session, errors


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
