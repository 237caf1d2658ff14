"""Bad input of every kind: a typed error that says what is wrong, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from raw_client import RawClient, Refused, attach_raw, attach_request, random_rows

from hillinfer_core.layout import DType, Precision, Shape
from hillinfer_core.protocol import TOKEN_KEY
from hillinfer_core.v1 import cold_pool_pb2 as pb

SHAPE = Shape(2, 2, 64, DType.float16, Precision.int8)
TOKENS = 64
BYTES = TOKENS * SHAPE.kv_heads * SHAPE.row_bytes
HUGE = (1 << 64) - 1


@pytest.fixture
def filled(client: RawClient) -> tuple[RawClient, int]:
    context = client.open(SHAPE)
    client.append(context, 0, 0, random_rows(np.random.default_rng(0), SHAPE, TOKENS))
    return client, context


def append_request(client: RawClient, context: int) -> pb.AppendRequest:
    assert client.arena is not None
    client.arena.view(0, (BYTES,), np.uint8)[:] = 0
    return pb.AppendRequest(
        context_id=context, layer=0, first_token=TOKENS, tokens=TOKENS, rows=client.region(0, BYTES)
    )


def evaluate_request(client: RawClient, context: int) -> pb.EvaluateRequest:
    assert client.arena is not None
    client.arena.view(0, (4 * 64,), np.float32)[:] = 1
    item = pb.Evaluation(
        context_id=context,
        first_token=0,
        end_token=TOKENS,
        k=8,
        query=client.region(0, 4 * 64 * 4),
        ids=client.region(8192, 2 * 8 * 4),
        scores=client.region(8256, 2 * 8 * 4),
        held=client.region(8320, 2 * 3 * 4),
        rows=client.region(16384, 16 * SHAPE.row_bytes),
    )
    return pb.EvaluateRequest(layer=0, query_heads=4, reduction=1, evaluations=[item])


def range_request(client: RawClient, context: int) -> pb.FetchRequest:
    which = pb.TokenRange(first_token=0, count=TOKENS)
    return pb.FetchRequest(context_id=context, layer=0, range=which, rows=client.region(0, BYTES))


def ids_request(client: RawClient, context: int) -> pb.FetchRequest:
    assert client.arena is not None
    client.arena.view(0, (4,), np.uint32)[:] = (0, 5, 63, 1)
    by_ids = pb.Ids(count_per_head=[3, 1], ids=client.region(0, 16))
    return pb.FetchRequest(
        context_id=context, layer=0, by_ids=by_ids, rows=client.region(4096, 4 * SHAPE.row_bytes)
    )


REQUESTS: dict[str, Callable[[RawClient, int], object]] = {
    "Append": append_request,
    "Evaluate": evaluate_request,
    "Range": range_request,
    "Ids": ids_request,
}
METHODS = {"Range": "Fetch", "Ids": "Fetch"}

Change = Callable[[object], object]

CASES: list[tuple[str, str, str, Change]] = [
    ("Append", "UnknownContext", "context", lambda r: setattr(r, "context_id", 999_999)),
    ("Append", "InvalidInput", "layer 2", lambda r: setattr(r, "layer", 2)),
    ("Append", "OutOfOrder", "holds 64", lambda r: setattr(r, "first_token", 0)),
    ("Append", "OutOfOrder", "holds 64", lambda r: setattr(r, "first_token", 128)),
    ("Append", "OutOfOrder", "holds 64", lambda r: setattr(r, "first_token", HUGE)),
    ("Append", "InvalidInput", "exactly", lambda r: setattr(r, "tokens", 48)),
    ("Append", "InvalidInput", "exactly", lambda r: setattr(r, "tokens", (1 << 32) - 16)),
    ("Append", "InvalidInput", "exactly", lambda r: setattr(r.rows, "length", 2 * BYTES)),
    ("Append", "InvalidInput", "multiple of 4096", lambda r: setattr(r.rows, "offset", 64)),
    ("Append", "InvalidInput", "outside", lambda r: setattr(r.rows, "offset", 4 << 20)),
    ("Append", "InvalidInput", "outside", lambda r: setattr(r.rows, "offset", HUGE)),
    ("Append", "InvalidInput", "generation", lambda r: setattr(r.rows, "generation", 77_777)),
    ("Append", "InvalidInput", "generation", lambda r: r.ClearField("rows")),
    ("Evaluate", "UnknownContext", "context", lambda r: setattr(r.evaluations[0], "context_id", 0)),
    ("Evaluate", "InvalidInput", "layer 9", lambda r: setattr(r, "layer", 9)),
    ("Evaluate", "InvalidInput", "0 held", lambda r: setattr(r, "layer", 1)),
    ("Evaluate", "InvalidInput", "query_heads", lambda r: setattr(r, "query_heads", 3)),
    ("Evaluate", "InvalidInput", "query_heads", lambda r: setattr(r, "query_heads", 0)),
    ("Evaluate", "InvalidInput", "query", lambda r: setattr(r, "query_heads", 2)),
    ("Evaluate", "InvalidInput", "reduction", lambda r: setattr(r, "reduction", 0)),
    ("Evaluate", "InvalidInput", "reduction", lambda r: setattr(r, "reduction", 7)),
    ("Evaluate", "InvalidInput", "1 to 256", lambda r: r.ClearField("evaluations")),
    ("Evaluate", "InvalidInput", "1 to 256", lambda r: r.evaluations.extend([r.evaluations[0]] * 256)),
    ("Evaluate", "InvalidInput", "k is 0", lambda r: setattr(r.evaluations[0], "k", 0)),
    ("Evaluate", "InvalidInput", "k is 65", lambda r: setattr(r.evaluations[0], "k", 65)),
    ("Evaluate", "InvalidInput", "range", lambda r: setattr(r.evaluations[0], "end_token", 65)),
    ("Evaluate", "InvalidInput", "range", lambda r: setattr(r.evaluations[0], "first_token", 64)),
    ("Evaluate", "InvalidInput", "range", lambda r: setattr(r.evaluations[0], "first_token", HUGE)),
    ("Evaluate", "InvalidInput", "query: offset", lambda r: setattr(r.evaluations[0].query, "offset", 2)),
    ("Evaluate", "InvalidInput", "ids: ", lambda r: setattr(r.evaluations[0].ids, "length", 60)),
    ("Evaluate", "InvalidInput", "ids: ", lambda r: r.evaluations[0].ClearField("ids")),
    ("Evaluate", "InvalidInput", "scores: ", lambda r: setattr(r.evaluations[0].scores, "length", 4)),
    ("Evaluate", "InvalidInput", "held: ", lambda r: setattr(r.evaluations[0].held, "length", 12)),
    ("Evaluate", "InvalidInput", "rows: ", lambda r: setattr(r.evaluations[0].rows, "offset", 16385)),
    ("Evaluate", "InvalidInput", "outside", lambda r: setattr(r.evaluations[0].rows, "length", 4 << 20)),
    ("Evaluate", "InvalidInput", "generation", lambda r: setattr(r.evaluations[0].held, "generation", 0)),
    ("Range", "InvalidInput", "range", lambda r: setattr(r.range, "count", 0)),
    ("Range", "InvalidInput", "range", lambda r: setattr(r.range, "count", 65)),
    ("Range", "InvalidInput", "range", lambda r: setattr(r.range, "first_token", HUGE)),
    ("Range", "InvalidInput", "at least", lambda r: setattr(r.rows, "length", BYTES - 2)),
    ("Range", "InvalidInput", "by_ids, range, tail or keys", lambda r: r.ClearField("range")),
    ("Ids", "InvalidInput", "count_per_head", lambda r: r.by_ids.count_per_head.append(1)),
    ("Ids", "InvalidInput", "at least", lambda r: setattr(r.rows, "length", 8)),
    ("Ids", "InvalidInput", "ids: ", lambda r: setattr(r.by_ids.ids, "offset", 1)),
    ("Ids", "InvalidInput", "outside", lambda r: setattr(r.by_ids.ids, "offset", HUGE - 3)),
]


@pytest.mark.parametrize(("kind", "error", "says", "change"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_a_bad_request_is_refused_and_changes_nothing(
    filled: tuple[RawClient, int], kind: str, error: str, says: str, change: Change
) -> None:
    client, context = filled
    method = METHODS.get(kind, kind)
    request = REQUESTS[kind](client, context)
    change(request)
    before = client.status()
    with pytest.raises(Refused) as caught:
        client.call(method, request)
    assert caught.value.error == error
    assert says in caught.value.message
    after = client.status()
    assert after.pool == before.pool
    assert after.device.worker_restarts == before.device.worker_restarts
    assert [each.contexts for each in after.sessions] == [each.contexts for each in before.sessions]
    client.call(method, REQUESTS[kind](client, context))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 15, 1, 63), (0, 47, 1, 5)])
@pytest.mark.parametrize("first", [0, TOKENS])
def test_rows_that_are_not_finite_leave_the_layer_as_it_was(
    client: RawClient, bad: float, place: tuple[int, ...], first: int
) -> None:
    rng = np.random.default_rng(1)
    context = client.open(SHAPE)
    good = random_rows(rng, SHAPE, TOKENS)
    if first:
        client.append(context, 0, 0, good)
    before = client.status().pool
    rows = random_rows(rng, SHAPE, TOKENS)
    rows[place] = bad
    with pytest.raises(Refused, match="NaN or inf") as caught:
        client.append(context, 0, first, rows)
    assert caught.value.error == "InvalidInput"
    assert client.status().pool == before
    after = client.append(context, 0, first, good)
    assert after.layer_tokens == first + TOKENS


def test_a_query_that_is_not_finite_is_refused(filled: tuple[RawClient, int]) -> None:
    client, context = filled
    query = np.ones((2, 64), np.float32)
    query[1, 3] = np.nan
    with pytest.raises(Refused, match="query contains NaN") as caught:
        client.evaluate(context, SHAPE, 0, query, 4, 0, TOKENS)
    assert caught.value.error == "InvalidInput"


def test_an_id_that_does_not_exist_is_refused(filled: tuple[RawClient, int]) -> None:
    client, context = filled
    for token in (TOKENS, 0xFFFFFFFF):
        with pytest.raises(Refused, match=f"token {token} does not exist") as caught:
            client.fetch_ids(context, SHAPE, 0, [[1], [token]])
        assert caught.value.error == "InvalidInput"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0),
        ("layers", 1 << 31),
        ("kv_heads", 0),
        ("kv_heads", 1 << 31),
        ("head_dim", 12),
        ("head_dim", 264),
        ("dtype", 0),
        ("dtype", 9),
        ("precision", 0),
    ],
)
def test_a_context_of_impossible_shape_is_refused(client: RawClient, field: str, value: int) -> None:
    fields = {"layers": 1, "kv_heads": 1, "head_dim": 64, "dtype": 1, "precision": 1, field: value}
    with pytest.raises(Refused, match=field) as caught:
        client.call("OpenContext", pb.OpenContextRequest(**fields))
    assert caught.value.error == "InvalidInput"
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_and_foreign_tokens_open_nothing(daemon: Path) -> None:
    with RawClient(daemon) as one, RawClient(daemon) as two:
        context = one.open(SHAPE)
        one.append(context, 0, 0, random_rows(np.random.default_rng(2), SHAPE, TOKENS))
        # Another session's context does not exist, by every operation.
        for kind, build in REQUESTS.items():
            with pytest.raises(Refused) as caught:
                two.call(METHODS.get(kind, kind), build(two, context))
            assert caught.value.error == "UnknownContext"
            assert caught.value.code is grpc.StatusCode.NOT_FOUND
        with pytest.raises(Refused) as caught:
            two.call("CloseContext", pb.CloseContextRequest(context_id=context))
        assert caught.value.error == "UnknownContext"

        good = two.token
        for token in ("", "x", good[:-1], good + "x"):
            two.token = token
            for call in (two.status, lambda: two.open(SHAPE)):
                with pytest.raises(Refused) as caught:
                    call()
                assert caught.value.error == "ForeignToken"
                assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
        assert one.status().sessions


def test_a_session_without_arena_has_no_regions(daemon: Path) -> None:
    with RawClient(daemon, 0) as client:
        assert client.arena is None
        assert client.status().version
        context = client.open(SHAPE)
        request = pb.AppendRequest(context_id=context, tokens=TOKENS, rows=pb.Region(length=BYTES))
        with pytest.raises(Refused, match="no arena") as caught:
            client.call("Append", request)
        assert caught.value.error == "InvalidInput"


@pytest.mark.parametrize(
    ("packet", "error", "says"),
    [
        (attach_request(protocol_version=1), "VersionMismatch", "protocol 1"),
        (attach_request(layout_version=7), "VersionMismatch", "layout 7"),
        (b"\xff\xff\xff", "InvalidInput", "not an AttachRequest"),
        (attach_request(client_name="n" * 65), "InvalidInput", "65 characters"),
        (attach_request(arena_bytes=1 << 40), "QuotaExceeded", "arena_limit"),
        (attach_request(arena_bytes=HUGE), "QuotaExceeded", "arena_limit"),
    ],
)
def test_attach_is_refused_with_a_reason(daemon: Path, packet: bytes, error: str, says: str) -> None:
    connection, reply, fds = attach_raw(daemon, packet)
    with connection:
        assert not fds
        assert reply.refused.error == error
        assert says in reply.refused.message
        assert connection.recv(1) == b""


@pytest.mark.parametrize("method", ["Append", "Evaluate", "OpenContext", "Status"])
def test_what_is_no_message_is_invalid_input(daemon: Path, method: str) -> None:
    with RawClient(daemon) as client:
        call = client.channel.stream_stream(f"/hillinfer.v1.ColdPool/{method}")
        answers = call(iter([b"\x0a\xff"]), timeout=20, metadata=((TOKEN_KEY, client.token),))
        with pytest.raises(grpc.RpcError) as refused:
            next(answers)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        client.call("Status", pb.StatusRequest())
