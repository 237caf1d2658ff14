"""Wrong use is refused with a typed error that says what is wrong, and leaves the session usable."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kv_rows import random_kv, random_query

from hillinfer import (
    Context,
    DType,
    EvaluateItem,
    Precision,
    PrivateDaemon,
    Session,
    Shape,
    errors,
)

SHAPE = Shape(layers=2, kv_heads=2, head_dim=64, dtype=DType.float32, precision=Precision.int4)
KEYS, VALUES = random_kv(SHAPE, 96)


@pytest.fixture
def context(session: Session) -> Context:
    opened = session.open_context(SHAPE)
    opened.append(0, KEYS, VALUES)
    return opened


def still_works(context: Context) -> None:
    np.testing.assert_array_equal(context.fetch_range(0, 0, 96)[:, :, 0], KEYS)
    assert context.evaluate(0, random_query(4, 64), 3).ids.shape == (2, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("token", [0, 95, 100])
@pytest.mark.parametrize("into", ["keys", "values"])
def test_numbers_that_are_not_finite(context: Context, bad: float, token: int, into: str) -> None:
    both = dict(zip(("keys", "values"), random_kv(SHAPE, 101), strict=True))
    both[into][1, token, 5] = bad
    with pytest.raises(errors.InvalidInput, match="finite"):
        context.append(0, **both)
    assert context.length(0) == 96
    still_works(context)


def test_bfloat16_not_a_number_in_the_tail(session: Session) -> None:
    shape = replace(SHAPE, dtype=DType.bfloat16)
    keys, values = random_kv(shape, 3)
    keys[0, 1, 1] = 0x7FC0
    with session.open_context(shape) as context, pytest.raises(errors.InvalidInput, match="finite"):
        context.append(0, keys, values)


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (KEYS.astype(np.float16), VALUES.astype(np.float16)),
        (KEYS, VALUES.astype(np.float64)),
        (KEYS[:1], VALUES[:1]),
        (KEYS[:, :, :32], VALUES[:, :, :32]),
        (KEYS[:, :5], VALUES[:, :6]),
        (KEYS[0], VALUES[0]),
    ],
)
def test_wrong_shape_or_dtype_in_append(context: Context, keys: np.ndarray, values: np.ndarray) -> None:
    with pytest.raises(errors.InvalidInput):
        context.append(0, keys, values)
    assert context.length(0) == 96
    still_works(context)


def append_for_long(context: Context) -> None:
    for _ in range(100):
        context.append(0, KEYS, VALUES)


def ask_for_long(session: Session) -> None:
    for _ in range(10_000):
        session.status()


def held(*ids: int) -> np.ndarray:
    return np.array([ids, ids], np.uint32)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda c: c.append(2, KEYS, VALUES),
        lambda c: c.length(-1),
        lambda c: c.fetch(0, np.full((2, 1), 96, np.uint32)),
        lambda c: c.fetch(0, np.full((2, 1), -1)),
        lambda c: c.fetch(0, np.zeros((3, 1), np.uint32)),
        lambda c: c.fetch(0, np.zeros((2, 1), np.float32)),
        lambda c: c.fetch(1, np.zeros((2, 1), np.uint32)),
        lambda c: c.fetch_range(0, 90, 7),
        lambda c: c.evaluate(0, random_query(4, 64), 0),
        lambda c: c.evaluate(0, random_query(4, 64), 97),
        lambda c: c.evaluate(0, random_query(4, 64), 1, end=97),
        lambda c: c.evaluate(0, random_query(3, 64), 1),
        lambda c: c.evaluate(0, random_query(4, 32), 1),
        lambda c: c.evaluate(0, random_query(4, 64).astype(np.float64), 1),
        lambda c: c.evaluate(0, random_query(4, 64) * np.float32(np.nan), 1),
        lambda c: c.session.evaluate_and_bring(0, [EvaluateItem(c, random_query(4, 64), 97, 0, 96, held())]),
        lambda c: c.session.evaluate_and_bring(0, [EvaluateItem(c, random_query(4, 64), 9, 0, 112, held())]),
        lambda c: c.session.evaluate_and_bring(2, [EvaluateItem(c, random_query(4, 64), 9, 0, 96, held())]),
        lambda c: c.session.evaluate_and_bring(
            0, [EvaluateItem(c, random_query(4, 64), 9, 0, 96, held(1)[:1])]
        ),
        lambda c: c.session.open_context(replace(SHAPE, head_dim=60)),
        lambda c: c.session.open_context(replace(SHAPE, layers=0)),
        lambda c: c.session.open_context(replace(SHAPE, kv_heads=1024, head_dim=256)),
    ],
)
def test_wrong_arguments(context: Context, wrong: Callable[[Context], object]) -> None:
    with pytest.raises(errors.InvalidInput):
        wrong(context)
    still_works(context)


def test_a_closed_context_is_unknown(context: Context) -> None:
    context.close()
    with pytest.raises(errors.UnknownContext):
        context.evaluate(0, random_query(4, 64), 1)
    with pytest.raises(errors.UnknownContext):
        context.close()


def test_a_context_of_another_session_is_unknown(context: Context, daemon: PrivateDaemon) -> None:
    with Session.connect(daemon.socket) as stranger:
        theirs = stranger.open_context(SHAPE)
        theirs._origin.context_id = context.context_id
        with pytest.raises(errors.UnknownContext):
            theirs.append(0, KEYS, VALUES)
    still_works(context)


def test_no_daemon_at_an_explicit_socket(tmp_path: Path) -> None:
    missing = tmp_path / "attach.sock"
    with pytest.raises(errors.DaemonUnavailable, match=str(missing)):
        Session.connect(missing)


def test_a_foreign_token(daemon: PrivateDaemon) -> None:
    with Session.connect(daemon.socket) as session:
        session._link._metadata = (("hillinfer-token", "not-a-token"),)
        with pytest.raises(errors.ForeignToken):
            session.open_context(SHAPE)
        with pytest.raises(errors.ForeignToken):
            session.status()


def test_the_token_of_a_session_that_has_ended(daemon: PrivateDaemon) -> None:
    with Session.connect(daemon.socket) as session:
        session._link._connection.shutdown(socket.SHUT_RDWR)
        # It must not ask for another session.
        session._link._hung_up = lambda within_s: False
        with pytest.raises(errors.ForeignToken):
            ask_for_long(session)


def test_a_closed_session(daemon: PrivateDaemon) -> None:
    session = Session.connect(daemon.socket)
    context = session.open_context(SHAPE)
    session.close()
    session.close()
    with pytest.raises(errors.DaemonUnavailable, match="closed"):
        context.append(0, KEYS, VALUES)
    with pytest.raises(errors.DaemonUnavailable, match="closed"):
        session.status()


def test_a_status_only_session_opens_no_context(daemon: PrivateDaemon) -> None:
    with (
        Session.connect(daemon.socket, arena_bytes=0) as session,
        pytest.raises(errors.InvalidInput, match="arena_bytes"),
    ):
        session.open_context(SHAPE)


def test_a_full_cold_pool() -> None:
    with PrivateDaemon(pool_capacity=1 << 20) as daemon, Session.connect(daemon.socket) as session:
        context = session.open_context(SHAPE)
        with pytest.raises(errors.PoolFull):
            append_for_long(context)
        held = context.length(0)
        assert held > 0
        np.testing.assert_array_equal(context.fetch_range(0, held - 96, 96)[:, :, 0], KEYS)
        context.close()
        again = session.open_context(SHAPE)
        again.append(0, KEYS, VALUES)
        still_works(again)


def test_the_limit_of_evaluation_keys_in_memory() -> None:
    with PrivateDaemon(evaluation_keys_dram=64 << 10) as daemon, Session.connect(daemon.socket) as session:
        context = session.open_context(SHAPE)
        with pytest.raises(errors.MemoryLimit):
            append_for_long(context)
        held = context.length(0)
        assert held > 0
        np.testing.assert_array_equal(context.fetch_range(0, held - 96, 96)[:, :, 0], KEYS)


def test_a_private_daemon_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        in_the_way = Path(temporary) / "not-a-directory"
        in_the_way.touch()
        with (
            pytest.raises(errors.DaemonUnavailable, match="not-a-directory"),
            PrivateDaemon(pool_dir=in_the_way),
        ):
            pass
        assert os.listdir(temporary) == ["not-a-directory"]


def test_a_private_daemon_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        with PrivateDaemon(pool_dir=tmp_path, pool_capacity=1 << 20) as daemon:
            assert daemon.socket.is_relative_to(temporary)
            assert any(name.endswith(".pool") for name in os.listdir(tmp_path))
        assert os.listdir(temporary) == os.listdir(tmp_path) == []
        with pytest.raises(errors.DaemonUnavailable):
            _ = daemon.socket
