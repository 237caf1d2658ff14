"""What tests of a restarted daemon write, and how they look at it."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from kv_rows import random_kv, random_query
from restart_reader import LABELS, SHAPE
from restartable import Restartable, restartable

from hillinfer import Context, EvaluateItem, Session
from hillinfer.evaluation import Selection

UNIT = SHAPE.append_unit
TOKENS = 20 * UNIT + 5
KEYS, VALUES = random_kv(SHAPE, TOKENS + 3 * UNIT)
ENDS = [signal.SIGKILL, signal.SIGTERM]
KILLED_OR_LONG = [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]


@contextmanager
def with_book() -> Iterator[Restartable]:
    """Start a daemon that keeps the context `book`."""
    with tempfile.TemporaryDirectory(prefix="hd-") as directory, restartable(Path(directory)) as running:
        with Session.connect(running.socket) as session:
            write(session, "book")
        yield running


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
