"""Contexts with a name: written in one session, read in others, to the bit."""

from __future__ import annotations

import grp
import os
import pwd
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kv_rows import random_kv, random_query

from hillinfer import Context, DType, EvaluateItem, Precision, PrivateDaemon, Session, Shape, errors

SHAPE = Shape(layers=2, kv_heads=2, head_dim=64, dtype=DType.float16, precision=Precision.int4)
UNIT = SHAPE.append_unit
TOKENS = 20 * UNIT + 5
KEYS, VALUES = random_kv(SHAPE, TOKENS + 3 * UNIT)
LABELS = {"model": "m1", "text": "t1"}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateDaemon]:
    pool_dir: Path = tmp_path_factory.mktemp("pool")
    with PrivateDaemon(pool_capacity=128 << 20, pool_dir=pool_dir) as running:
        yield running


@pytest.fixture
def other(daemon: PrivateDaemon) -> Iterator[Session]:
    with Session.connect(daemon.socket, name="other", timeout_s=20) as connected:
        yield connected


@pytest.fixture(autouse=True)
def _clean(daemon: PrivateDaemon) -> Iterator[None]:
    yield
    with Session.connect(daemon.socket, arena_bytes=0) as session:
        # A session ends when the daemon sees its socket hang up, a little after `close`.
        deadline = time.monotonic() + 10
        while len(session.status().sessions) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for each in session.list_contexts():
            session.delete_context(each.name)
        assert session.status().pool.used_bytes == 0


def fill(context: Context, first: int = 0, end: int = TOKENS) -> None:
    for layer in range(SHAPE.layers):
        context.append(layer, *part(layer, first, end))


def part(layer: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Another layer, other rows: values and keys change places."""
    pair = (KEYS[:, first:end], VALUES[:, first:end])
    return pair if layer % 2 == 0 else pair[::-1]


def save(daemon: PrivateDaemon, name: str = "book") -> None:
    with Session.connect(daemon.socket) as session:
        context = session.open_context(SHAPE, durable=name, labels=LABELS)
        fill(context)
        context.save()


def check(context: Context, end: int = TOKENS) -> None:
    for layer in range(SHAPE.layers):
        keys, values = part(layer, 0, end)
        assert context.length(layer) == end
        assert context.flushed(layer) == end // UNIT * UNIT
        rows = context.fetch_range(layer, 0, end)
        np.testing.assert_array_equal(rows[:, :, 0], keys)
        np.testing.assert_array_equal(rows[:, :, 1], values)
        ids = np.array([[end - 1, 0, end - UNIT], [3, end - 1, end - 2]], np.uint32)
        fetched = context.fetch(layer, ids)[0]
        np.testing.assert_array_equal(fetched, np.take_along_axis(keys, ids[:, :, None].astype(int), 1))


def ranked(session: Session, context: Context, seed: int) -> list[np.ndarray]:
    query = random_query(4, 64, seed)
    empty = np.empty((2, 0), np.uint32)
    out: list[np.ndarray] = []
    for layer in range(SHAPE.layers):
        selection = context.evaluate(layer, query, 50)
        end = context.flushed(layer)
        [brought] = session.evaluate_and_bring(layer, [EvaluateItem(context, query, 40, 4, end, empty)])
        out += [selection.ids, selection.scores, brought.ids, brought.rows]
    return out


def same(one: list[np.ndarray], two: list[np.ndarray]) -> None:
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_saved_context_is_read_and_continued_like_one_of_ones_own(
    daemon: PrivateDaemon, session: Session, other: Session
) -> None:
    save(daemon)
    own = session.open_context(SHAPE)
    fill(own)
    first = session.open_context(SHAPE, base="book", labels=LABELS)
    second = other.open_context(SHAPE, base="book", labels=LABELS)
    for context in (first, second):
        check(context)
        assert context.checksum_bytes == own.checksum_bytes > 0
        same(ranked(context.session, context, 1), ranked(session, own, 1))
    # Each goes on by itself; what is shared stays as it was.
    more = TOKENS + 2 * UNIT + 1
    fill(own, TOKENS, more)
    fill(first, TOKENS, more)
    check(first, more)
    same(ranked(session, first, 2), ranked(session, own, 2))
    check(second)
    first.close()
    check(second)


def test_saved_means_read_only_also_for_the_writer(session: Session) -> None:
    context = session.open_context(SHAPE, durable="book", labels=LABELS)
    fill(context)
    assert context.durable_name == "book"
    context.save()
    assert context.saved
    for change in (lambda: context.append(0, KEYS[:, :1], VALUES[:, :1]), context.save):
        with pytest.raises(errors.InvalidInput, match="base='book'"):
            change()
    check(context)
    assert ranked(session, context, 1)[0].shape == (2, 50)
    with pytest.raises(errors.InvalidInput, match="durable=NAME"):
        session.open_context(SHAPE).save()


def test_one_that_was_not_saved_is_continued_without_its_tail(
    daemon: PrivateDaemon, session: Session
) -> None:
    with Session.connect(daemon.socket) as interrupted:
        fill(interrupted.open_context(SHAPE, durable="book", labels=LABELS))
    with pytest.raises(errors.HillInferError, match="book"):
        session.open_context(SHAPE, base="book", labels=LABELS)
    flushed = TOKENS // UNIT * UNIT
    with session.open_context(SHAPE, durable="book", labels=LABELS) as context:
        check(context, flushed)
        fill(context, flushed)
        check(context)
        context.save()
    check(session.open_context(SHAPE, base="book", labels=LABELS))


def test_layers_of_different_lengths_say_so(daemon: PrivateDaemon, session: Session) -> None:
    with Session.connect(daemon.socket) as interrupted:
        context = interrupted.open_context(SHAPE, durable="book")
        context.append(1, *part(1, 0, 3 * UNIT + 1))
    context = session.open_context(SHAPE, durable="book")
    assert [context.length(layer) for layer in range(2)] == [0, 3 * UNIT]


@pytest.mark.parametrize(
    ("shape", "labels", "named"),
    [
        (SHAPE, {**LABELS, "text": "t2"}, "text"),
        (SHAPE, {"model": "m1"}, "text"),
        (replace(SHAPE, dtype=DType.bfloat16), LABELS, "float16"),
        (replace(SHAPE, precision=Precision.int8), LABELS, "int4"),
        (replace(SHAPE, layers=3), LABELS, "layers"),
        (replace(SHAPE, head_dim=128), LABELS, "head_dim"),
    ],
)
def test_what_was_made_from_something_else_is_refused(
    daemon: PrivateDaemon, session: Session, shape: Shape, labels: dict[str, str], named: str
) -> None:
    save(daemon)
    for kind in ("base", "durable"):
        with pytest.raises(errors.ContextMismatch, match=named):
            session.open_context(shape, labels=labels, **{kind: "book"})
    check(session.open_context(SHAPE, base="book", labels=LABELS))


def test_only_one_writes_and_what_is_read_is_not_deleted(session: Session, other: Session) -> None:
    writer = session.open_context(SHAPE, durable="book")
    with pytest.raises(errors.ContextInUse):
        other.open_context(SHAPE, durable="book")
    with pytest.raises(errors.ContextInUse):
        other.delete_context("book")
    fill(writer)
    writer.save()
    with pytest.raises(errors.ContextInUse):
        other.open_context(SHAPE, durable="book")
    writer.close()
    reader = other.open_context(SHAPE, base="book")
    with pytest.raises(errors.ContextInUse):
        session.delete_context("book")
    reader.close()
    assert session.delete_context("book") > 0
    with pytest.raises(errors.UnknownContext, match="book"):
        session.delete_context("book")
    with pytest.raises(errors.UnknownContext, match="book"):
        session.open_context(SHAPE, base="book")


def test_the_list_says_what_there_is(daemon: PrivateDaemon, session: Session) -> None:
    assert session.list_contexts() == []
    save(daemon, "zebra")
    save(daemon, "ape")
    with session.open_context(SHAPE, durable="bear"), session.open_context(SHAPE, base="ape", labels=LABELS):
        listed = session.list_contexts()
        assert [each.name for each in listed] == ["ape", "bear", "zebra"]
        assert [each.saved for each in listed] == [True, False, True]
        assert [each.users for each in listed] == [1, 1, 0]
    ape = session.find_context("ape")
    assert ape is not None
    assert (ape.tokens, ape.shape, ape.labels) == (TOKENS, SHAPE, LABELS)
    assert ape.extent_bytes >= TOKENS // UNIT * UNIT * SHAPE.layers * SHAPE.kv_heads * SHAPE.row_bytes
    assert session.find_context("lion") is None
    with Session.connect(daemon.socket, arena_bytes=0) as onlooker:
        assert [each.name for each in onlooker.list_contexts()] == ["ape", "bear", "zebra"]


def test_saved_for_a_group(session: Session) -> None:
    group = grp.getgrgid(os.getgid())
    for number, wanted in enumerate((group.gr_name, group.gr_gid)):
        context = session.open_context(SHAPE, durable=f"shared {number}", labels=LABELS)
        fill(context)
        with pytest.raises(errors.InvalidInput, match="there is no group"):
            context.save(group="no such group")
        context.save(group=wanted)
    found = session.find_context("shared 0", pwd.getpwuid(os.getuid()).pw_name)
    assert found is not None
    assert found.gid == group.gr_gid
    check(session.open_context(SHAPE, base="shared 1", owner=os.getuid(), labels=LABELS))
    assert session.find_context("shared 0", os.getuid() + 1) is None
    with pytest.raises(errors.UnknownContext):
        session.open_context(SHAPE, base="shared 0", owner=os.getuid() + 1, labels=LABELS)
    with pytest.raises(errors.InvalidInput, match="there is no user"):
        session.open_context(SHAPE, base="shared 0", owner="no such user", labels=LABELS)


@pytest.mark.parametrize("name", ["", " a", "a ", "x" * 300, "new\nline", "nul\0"])
def test_bad_names(session: Session, name: str) -> None:
    with pytest.raises(errors.InvalidInput, match="name"):
        session.open_context(SHAPE, durable=name)
    with pytest.raises((errors.InvalidInput, errors.UnknownContext)):
        session.open_context(SHAPE, base=name)
    assert session.list_contexts() == []


@pytest.mark.parametrize("name", ["a/b", "../..", "two words", "Bücher"])
def test_names_are_no_paths(daemon: PrivateDaemon, session: Session, name: str) -> None:
    save(daemon, name)
    assert session.find_context(name) is not None
    check(session.open_context(SHAPE, base=name, labels=LABELS))


def test_arguments_that_do_not_go_together(session: Session) -> None:
    with pytest.raises(errors.InvalidInput, match="not both"):
        session.open_context(SHAPE, durable="a", base="b")
    with pytest.raises(errors.InvalidInput, match="durable or base"):
        session.open_context(SHAPE, labels=LABELS)
    with pytest.raises(errors.InvalidInput):
        session.open_context(SHAPE, durable="a", labels={"text": "x" * 257})
    with pytest.raises(errors.InvalidInput):
        session.open_context(SHAPE, durable="a", labels={str(n): "" for n in range(17)})


def test_many_threads_read_one_context(daemon: PrivateDaemon, session: Session) -> None:
    save(daemon)
    own = session.open_context(SHAPE)
    fill(own)
    expected = [ranked(session, own, seed) for seed in range(4)]
    failures: list[BaseException] = []

    def read(seed: int) -> None:
        try:
            with Session.connect(daemon.socket, name=f"reader {seed}") as mine:
                context = mine.open_context(SHAPE, base="book", labels=LABELS)
                check(context)
                same(ranked(mine, context, seed), expected[seed])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
