"""The ring of a running daemon: the same answers as by gRPC, and what breaks its rules."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from raw_client import RawClient, attach_raw, attach_request
from raw_ring import RawRing

from hillinfer import Context, DType, EvaluateItem, Precision, PrivateDaemon, Session, Shape
from hillinfer.session import Counters
from hillinfer_core.errors import DaemonUnavailable, DeadlineExceeded, HillInferError, InvalidInput
from hillinfer_core.packed import Request, pack_request
from hillinfer_core.protocol import attach_socket
from hillinfer_core.ring import (
    ENTRIES,
    Entry,
    Method,
    ring_doorbell,
)
from hillinfer_core.v1 import cold_pool_pb2 as pb

SHAPE = Shape(1, 2, 64, DType.float16, Precision.int8)


@pytest.fixture
def ring(daemon: Path) -> Iterator[RawRing]:
    raw = RawRing(daemon)
    yield raw
    raw.close()


def test_both_transports_give_the_same(daemon: Path) -> None:
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 2, 2048, 64)).astype(np.float16)
    query = rng.standard_normal((4, 64)).astype(np.float32)
    held = np.full((2, 8), 0xFFFFFFFF, np.uint32)
    found = []
    for ring in (True, False):
        with Session.connect(attach_socket(daemon), ring=ring) as session:
            context = session.open_context(SHAPE)
            context.append(0, keys, values)
            (brought,) = session.evaluate_and_bring(0, [EvaluateItem(context, query, 40, 4, 2000, held)])
            rows = context.fetch_rows(0, brought.ids)
            with pytest.raises(InvalidInput, match="NaN"):
                session.evaluate_and_bring(0, [EvaluateItem(context, query * np.nan, 40, 4, 2000, held)])
            context.close()
            assert session.counters != Counters()
            found.append((brought.ids, brought.rows, rows, session.counters))
    (ids, brought_rows, rows, counters), other = found
    for mine, theirs in zip((ids, brought_rows, rows), other, strict=False):
        np.testing.assert_array_equal(mine, theirs)
    assert counters == other[3]


def test_many_requests_at_once_are_all_answered(ring: RawRing) -> None:
    for ticket in range(ENTRIES):
        request = pb.FetchRequest(context_id=77, layer=0, range=pb.TokenRange(first_token=0, count=1))
        ring.submissions.put(Entry(ticket, Method.Fetch, 1000, request.SerializeToString()))
    ring_doorbell(ring.fds.submitted)
    entries = ring.completed(ENTRIES)
    assert sorted(entry.ticket for entry in entries) == list(range(ENTRIES))
    assert {ring.refusal(entry).error for entry in entries} == {"UnknownContext"}


@pytest.mark.parametrize(
    ("code", "payload", "said"),
    [
        (99, b"", "no method 99"),
        (Method.Evaluate, b"\xff\xff\xff", "not a EvaluateRequest"),
        (Method.EvaluatePacked, b"\xff" * 3, "not a packed evaluation"),
        (Method.EvaluatePacked, b"\xff" * 16, "not a packed request"),
        (Method.EvaluatePacked, bytes(pack_request(Request(0, 8, 9, 0, []))), "reduction 9 is not known"),
        (Method.EvaluatePacked, bytes(pack_request(Request(0, 8, 1, 0, []))), "1 to 256 evaluations"),
        (Method.Append, b"\x08", "not a AppendRequest"),
        (Method.Fetch, b"", "fetch needs by_ids"),
    ],
)
def test_what_makes_no_sense_is_refused_and_the_ring_goes_on(
    ring: RawRing, code: int, payload: bytes, said: str
) -> None:
    for ticket in (1, 2):
        ring.submissions.put(Entry(ticket, code, 0, payload))
        ring_doorbell(ring.fds.submitted)
        (entry,) = ring.completed(1)
        assert entry.ticket == ticket
        assert said in ring.refusal(entry).message
        assert ring.refusal(entry).error == "InvalidInput"


def test_a_request_that_is_repeated_is_held_to_what_is_so_now(daemon: Path) -> None:
    """What was checked once is not checked again; what can change is."""
    rows = np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float16)
    with Session.connect(attach_socket(daemon)) as session:
        context, other = session.open_context(SHAPE), session.open_context(SHAPE)
        query, held = np.ones((2, 64), np.float32), np.full((2, 4), 0xFFFFFFFF, np.uint32)

        def ask(of: Context, k: int, first: int, end: int, layer: int = 0) -> None:
            session.evaluate_and_bring(layer, [EvaluateItem(of, query, k, first, end, held)])

        for tokens in (64, 128):
            context.append(0, rows, rows)
            for end in (tokens, 4, tokens):
                ask(context, 4, 0, end)
            for first, end, said in ((0, tokens + 1, "are not a range"), (9, 9, "are not a range")):
                with pytest.raises(InvalidInput, match=said):
                    ask(context, 4, first, end)
            with pytest.raises(InvalidInput, match="k is 4"):
                ask(context, 4, 1, 4)
            with pytest.raises(InvalidInput, match="layer 1 does not exist"):
                ask(context, 4, 0, 4, layer=1)
        with pytest.raises(InvalidInput, match="0 held by layer"):
            ask(other, 4, 0, 4)
        ask(context, 4, 0, 128)
        context.close()
        with pytest.raises(HillInferError, match="not an open context"):
            ask(context, 4, 0, 128)


@pytest.mark.parametrize("where", [0, 64 * 3])  # entries submitted; completions taken
def test_a_client_that_breaks_the_rules_is_hung_up_on_alone(
    daemon: Path, client: RawClient, ring: RawRing, where: int
) -> None:
    struct.pack_into("<I", ring.memory.buffer(where, 4), 0, 0x7FFFFFFF)
    if where:
        ring.submissions.put(Entry(1, Method.Fetch, 0, b""))
    ring_doorbell(ring.fds.submitted)
    assert ring.hung_up()
    assert client.open(SHAPE) > 0


def test_a_ring_needs_an_arena(daemon: Path) -> None:
    connection, reply, _ = attach_raw(daemon, attach_request(0, ring=True))
    with connection:
        assert reply.refused.error == "InvalidInput"


def test_a_daemon_that_stops_answering_or_dies_is_an_error() -> None:
    with PrivateDaemon() as daemon:
        session = Session.connect(daemon.socket)
        context = session.open_context(SHAPE)
        rows = np.ones((2, 64, 64), np.float16)
        context.append(0, rows, rows)
        session.timeout_s = 0.5
        os.kill(daemon.pid, signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded, match="Fetch"):
            context.fetch_range(0, 0, 1)
        # The daemon may still write to the arena when it goes on.
        with pytest.raises(DaemonUnavailable, match="connect a new session"):
            context.fetch_range(0, 0, 1)
        os.kill(daemon.pid, signal.SIGCONT)

        other = Session.connect(daemon.socket, restart_s=0.2)
        kept = other.open_context(SHAPE)
        kept.append(0, rows, rows)
        os.kill(daemon.pid, signal.SIGKILL)
        with pytest.raises(DaemonUnavailable, match="went away"):
            kept.fetch_range(0, 0, 1)
        session.close()
        other.close()
