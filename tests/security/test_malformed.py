"""What is no message, and messages full of absurd numbers: for every method a status and a typed error."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from honest import SHAPE, TOKENS, Honest
from raw_client import RawClient, Refused, attach_raw, random_rows
from raw_ring import RawRing

from hillinfer_core.errors import by_name
from hillinfer_core.protocol import ERROR_KEY, TOKEN_KEY
from hillinfer_core.ring import PAYLOAD_BYTES, Entry, Method, Outcome, ring_doorbell
from hillinfer_core.v1 import admin_pb2
from hillinfer_core.v1 import cold_pool_pb2 as pb

FILES = (pb, admin_pb2, health_pb2, reflection_pb2)
METHODS = [
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]

NO_MESSAGES = {
    "cut varint": b"\xff\xff\xff",
    "no such wire type": b"\x07",
    "longer than it is": b"\x0a\x7fabc",
    "longer than anything": b"\x0a\xff\xff\xff\xff\x07abc",
    "negative length": b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    "group without end": b"\x0b\x0b\x0b",
    "end without group": b"\x0c",
    "groups in groups": b"\x0b" * 200_000,
}

TOO_LARGE = bytes([0x0A]) + b"\x80\x80\x80\x04" + bytes(8 << 20)

NUMBERS = [0, 1, 2, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]

STRINGS = [
    "",
    "x" * 100_000,
    "../../etc/passwd",
    "a\0b",
    "\x1b[2J",
    " ",
    "'; DROP TABLE record; --",
    "\U0010ffff",
]


def _raw(client: RawClient, method: str, payload: bytes) -> grpc.RpcError:
    call = client.channel.stream_stream(method)
    with pytest.raises(grpc.RpcError) as refused:
        list(call(iter([payload]), timeout=20, metadata=((TOKEN_KEY, client.token),)))
    return refused.value


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_message_has_its_status_for_every_method(
    attacker: RawClient, honest: Honest, method: str
) -> None:
    for payload in NO_MESSAGES.values():
        error = _raw(attacker, method, payload)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert dict(error.trailing_metadata())[ERROR_KEY] == "InvalidInput"
    assert _raw(attacker, method, TOO_LARGE).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    attacker.status()


@pytest.mark.parametrize("payload", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_what_is_no_message_is_refused_at_attach(daemon: Path, honest: Honest, payload: bytes) -> None:
    connection, reply, fds = attach_raw(daemon, payload[:60_000])
    with connection:
        assert (reply.refused.error, fds) == ("InvalidInput", [])
        assert connection.recv(1) == b""


@pytest.mark.parametrize("payload", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_what_is_no_message_is_refused_on_the_ring(daemon: Path, honest: Honest, payload: bytes) -> None:
    ring = RawRing(daemon)
    for method in Method:
        ring.submissions.put(Entry(method, method, 0, payload[:PAYLOAD_BYTES]))
    ring_doorbell(ring.fds.submitted)
    entries = ring.completed(len(Method))
    assert {ring.refusal(entry).error for entry in entries} == {"InvalidInput"}
    ring.close()


def test_methods_that_there_are_not_are_unimplemented(attacker: RawClient, honest: Honest) -> None:
    for method in ("/hillinfer.v1.ColdPool/Steal", "/hillinfer.v2.ColdPool/Status", "/", "/x", "//"):
        assert _raw(attacker, method, b"").code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.fixture
def requests(daemon: Path) -> Iterator[tuple[RawClient, Callable[[], dict[str, list[Message]]]]]:
    """A session, and what makes requests of it that are right, by method."""
    with RawClient(daemon, 4 << 20) as client:
        context = client.open(SHAPE)
        client.append(context, 0, 0, random_rows(np.random.default_rng(0), SHAPE, TOKENS))
        yield client, lambda: _right(client, context)


def _right(client: RawClient, context: int) -> dict[str, list[Message]]:
    region = client.region
    assert client.arena is not None
    client.arena.view(0, (2048,), np.float32)[:] = 1
    client.arena.view(1 << 20, (64,), np.uint32)[:] = 3
    item = pb.Evaluation(
        context_id=context, end_token=TOKENS, k=8, query=region(0, 1024), ids=region(4096, 64)
    )
    for name, at in (("scores", 8192), ("held", 1 << 20), ("rows", 2 << 20)):
        getattr(item, name).CopyFrom(region(at, 64))
    apart = pb.Evaluation(
        context_id=context, end_token=TOKENS, k=8, query=region(0, 1024), ids=region(4096, 128)
    )
    apart.histogram.CopyFrom(region(1 << 20, 4 * 8192))
    apart.scales.CopyFrom(region(8192, 4 * 48))
    rows = region(2 << 20, TOKENS * SHAPE.kv_heads * SHAPE.row_bytes)
    ids = pb.Ids(count_per_head=[3, 5], ids=region(1 << 20, 32))
    keys = pb.KeyRange(end_token=TOKENS, scales=region(0, 512))
    shape = {"layers": 1, "kv_heads": 2, "head_dim": 64, "dtype": 1, "precision": 1}
    return {
        "OpenContext": [
            pb.OpenContextRequest(**shape),
            pb.OpenContextRequest(**shape, durable_name="a", labels={"b": "c"}),
            pb.OpenContextRequest(**shape, base_name="a"),
        ],
        "CloseContext": [pb.CloseContextRequest(context_id=1 << 40)],
        "Append": [
            pb.AppendRequest(
                context_id=context, layer=0, first_token=TOKENS, tokens=64, rows=region(0, 32768)
            ),
            pb.AppendRequest(
                context_id=context, first_token=TOKENS, tokens=3, rows=region(0, 1536), tail=True
            ),
        ],
        "Evaluate": [
            pb.EvaluateRequest(query_heads=4, reduction=1, evaluations=[item]),
            pb.EvaluateRequest(query_heads=4, reduction=2, evaluations=[item, item]),
            pb.EvaluateRequest(query_heads=4, reduction=3, evaluations=[apart]),
        ],
        "Fetch": [
            pb.FetchRequest(context_id=context, by_ids=ids, rows=rows),
            pb.FetchRequest(context_id=context, range=pb.TokenRange(count=TOKENS), rows=rows),
            pb.FetchRequest(context_id=context, keys=keys, rows=rows),
            pb.FetchRequest(context_id=context, tail=pb.Tail(), rows=rows),
        ],
        "SaveContext": [pb.SaveContextRequest(context_id=context)],
        "DeleteContext": [pb.DeleteContextRequest(name="a", uid=0)],
    }


def _changes(message: Message) -> Iterator[Callable[[Message], None]]:
    """Everything that sets one field, however deep, to something absurd, or drops it."""
    for field in message.DESCRIPTOR.fields:
        path = field.name
        yield lambda at, path=path: at.ClearField(path)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            yield lambda at, path=path: getattr(at, path).update({text: text for text in STRINGS})
            yield lambda at, path=path: getattr(at, path).update({str(each): "" for each in range(5000)})
        elif field.message_type is not None and field.is_repeated:
            yield lambda at, path=path: getattr(at, path).extend(list(getattr(at, path)) * 300)
            for change in _changes(next(iter(getattr(message, path)), field.message_type._concrete_class())):
                yield lambda at, path=path, change=change: change(getattr(at, path)[-1])
        elif field.message_type is not None:
            for change in _changes(getattr(message, path)):
                yield lambda at, path=path, change=change: change(getattr(at, path))
        elif field.is_repeated:
            for value in _values(field):
                yield lambda at, path=path, value=value: getattr(at, path).__setitem__(0, value)
            yield lambda at, path=path: getattr(at, path).extend([1] * 100_000)
        else:
            for value in _values(field):
                yield lambda at, path=path, value=value: setattr(at, path, value)


def _values(field: FieldDescriptor) -> list[Any]:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return STRINGS
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return [False, True]
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return [0, 3, 99, (1 << 31) - 1, -1, -(1 << 31)]
    wide = field.cpp_type == FieldDescriptor.CPPTYPE_UINT64
    return [number for number in NUMBERS if wide or number < 1 << 32]


def test_any_field_may_be_absurd(
    requests: tuple[RawClient, Callable[[], dict[str, list[Message]]]], honest: Honest
) -> None:
    """One field at a time of every request: done, or refused with the status of a typed error."""
    client, right = requests
    outcomes: Counter[str] = Counter()
    for method, messages in right().items():
        for number, message in enumerate(messages):
            for change in _changes(message):
                request = right()[method][number]
                try:
                    change(request)
                except (IndexError, ValueError):
                    continue  # not in this request
                outcomes[_outcome(client, method, request)] += 1
        honest.check()
    print(dict(outcomes))
    assert sum(outcomes.values()) > 400
    assert {"InvalidInput", "UnknownContext", "OutOfOrder", "done"} <= set(outcomes)


def _outcome(client: RawClient, method: str, request: Message) -> str:
    """Make the call; return "done" or the name of the error, whose status must be that of the call."""
    try:
        client.call(method, request)
    except Refused as error:
        refused = error
    else:
        return "done"
    assert refused.error not in ("", "HillInferError"), (method, request, refused)
    assert refused.code is grpc.StatusCode[by_name(refused.error).status]
    return refused.error


@pytest.mark.parametrize("method", ["CloseSession", "CecStatus", "CecLoad", "CecRollback"])
def test_absurd_administration_is_refused(attacker: RawClient, honest: Honest, method: str) -> None:
    kind = getattr(admin_pb2, f"{method}Request")
    messages = [kind(session_id=number) for number in NUMBERS[3:]] if method == "CloseSession" else []
    messages += [kind(drive=text) for text in STRINGS[1:]] if method != "CloseSession" else []
    messages += [kind(name=text) for text in STRINGS] if method == "CecLoad" else []
    for message in messages:
        error = _raw(attacker, f"/hillinfer.v1.Admin/{method}", message.SerializeToString())
        name = dict(error.trailing_metadata())[ERROR_KEY]
        assert name != "HillInferError"
        assert error.code() is grpc.StatusCode[by_name(name).status]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, np.float32(3.4e38), np.float32(1e-45)])
@pytest.mark.parametrize("reduction", [1, 2, 3])
def test_numbers_that_are_none_and_the_last_that_are(
    requests: tuple[RawClient, Callable[[], dict[str, list[Message]]]],
    honest: Honest,
    bad: float,
    reduction: int,
) -> None:
    client, right = requests
    request = right()["Evaluate"][reduction - 1]
    assert client.arena is not None
    client.arena.view(0, (256,), np.float32)[5] = bad
    if np.isfinite(bad):
        client.call("Evaluate", request)
    else:
        with pytest.raises(Refused, match="NaN") as caught:
            client.call("Evaluate", request)
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_absurd_codes_tickets_and_deadlines_are_answered_on_the_ring(daemon: Path, honest: Honest) -> None:
    ring = RawRing(daemon)
    garbage = struct.pack("<I", 7) * (PAYLOAD_BYTES // 4)
    for code in (0, 4, 255, (1 << 32) - 1):
        ring.submissions.put(Entry((1 << 64) - 1, code, (1 << 32) - 1, garbage))
    ring_doorbell(ring.fds.submitted)
    for entry in ring.completed(4):
        assert (entry.ticket, entry.code) == ((1 << 64) - 1, Outcome.refused)
        assert "no method" in ring.refusal(entry).message
    ring.close()
