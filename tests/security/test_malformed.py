"""What is no message, and messages full of absurd numbers: for every method a status and a typed error."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from absurd import NUMBERS, STRINGS, changes, outcome, right_requests
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

TOO_LARGE = b"\x0a\x80\x80\x80\x02" + bytes((4 << 20) + 1)


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
        yield client, lambda: right_requests(client, context)


def test_any_field_may_be_absurd(
    requests: tuple[RawClient, Callable[[], dict[str, list[Message]]]], honest: Honest
) -> None:
    """One field at a time of every request: done, or refused with the status of a typed error."""
    client, right = requests
    outcomes: Counter[str] = Counter()
    for method, messages in right().items():
        for number, message in enumerate(messages):
            for change in changes(message):
                request = right()[method][number]
                try:
                    change(request)
                except (IndexError, ValueError):
                    continue  # not in this request
                outcomes[outcome(client, method, request)] += 1
        honest.check()
    print(dict(outcomes))
    assert sum(outcomes.values()) > 400
    assert {"InvalidInput", "UnknownContext", "OutOfOrder", "done"} <= set(outcomes)


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
    for code in (0, 5, 255, (1 << 32) - 1):
        ring.submissions.put(Entry((1 << 64) - 1, code, (1 << 32) - 1, garbage))
    ring_doorbell(ring.fds.submitted)
    for entry in ring.completed(4):
        assert (entry.ticket, entry.code) == ((1 << 64) - 1, Outcome.refused)
        assert "no method" in ring.refusal(entry).message
    ring.close()
