"""Messages by chance, seeded, over the attach socket, gRPC and the ring: 5,000, and 100,000 that are long.

Each is answered, with a typed error unless it was right; nobody else notices.
"""

from __future__ import annotations

import os
import random
import socket
import struct
from collections import Counter
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from absurd import NUMBERS, changes, right_requests
from google.protobuf.message import Message
from honest import SHAPE, TOKENS, Honest
from raw_client import CALL_S, RawClient, attach_request, log_of, random_rows, wait_for
from raw_ring import RawRing

from hillinfer_core import packed
from hillinfer_core.attach_socket import connect
from hillinfer_core.errors import by_name
from hillinfer_core.protocol import ERROR_KEY, TOKEN_KEY, attach_socket
from hillinfer_core.ring import ENTRIES, PAYLOAD_BYTES, Entry, Method, Outcome, ring_doorbell
from hillinfer_core.v1 import attach_pb2
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinfer_core.v1.cold_pool_pb2_grpc import ColdPoolStub

BATCH = 250
"""Messages between two looks at the honest session, and of one session that sends them."""

ROWS = random_rows(np.random.default_rng(0), SHAPE, TOKENS)
BYTES = (0, 1, 0x7F, 0x80, 0xFF)

TYPED = "typed"
DONE = "done"


@pytest.mark.parametrize("seed", range(2))
def test_thousands_of_messages_by_chance(daemon: Path, honest: Honest, seed: int) -> None:
    _fuzz(daemon, honest, seed, 2500)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 110))
def test_a_hundred_thousand_messages_by_chance(daemon: Path, honest: Honest, seed: int) -> None:
    _fuzz(daemon, honest, seed, 10_000)


def _fuzz(daemon: Path, honest: Honest, seed: int, count: int) -> None:
    rng = random.Random(seed)
    pid = int((daemon / "lock").read_text())
    fds = len(os.listdir(f"/proc/{pid}/fd"))
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for batch in range(count // BATCH):
        transport = (_by_attach, _by_grpc, _by_ring)[batch % 3]
        transport(daemon, rng, outcomes)
        slowest = max(slowest, honest.check())
    assert sum(outcomes.values()) == count // BATCH * BATCH
    wait_for(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= fds, CALL_S)
    log = log_of(daemon)
    assert "unexpected" not in log
    print(
        f"seed {seed}: {dict(sorted(outcomes.items()))}, evaluations beside it {slowest * 1e3:.0f} ms at most"
    )


class _Mutations:
    """Messages that were right; every second has other values in its fields, every second other bytes."""

    def __init__(self, rng: random.Random, right: list[Message | bytes]) -> None:
        self._rng = rng
        self._kinds = [None if isinstance(each, bytes) else type(each) for each in right]
        self._bytes = [each if isinstance(each, bytes) else each.SerializeToString() for each in right]
        self._changes = [[] if isinstance(each, bytes) else list(changes(each)) for each in right]

    def of(self, number: int) -> bytes:
        """Return a mutation of the message of that number."""
        kind, data = self._kinds[number], self._bytes[number]
        if self._rng.random() < 0.5:
            return _mutated(self._rng, data, self._bytes)
        if kind is None:
            return self._other_numbers(data)
        message = kind.FromString(data)
        for _ in range(self._rng.randrange(3)):
            # Some change what the first has taken away.
            with suppress(IndexError, ValueError):
                self._rng.choice(self._changes[number])(message)
        return message.SerializeToString()

    def _other_numbers(self, packed: bytes) -> bytes:
        data = bytearray(packed)
        for _ in range(self._rng.randrange(3)):
            at = self._rng.randrange(len(data) // 4) * 4
            data[at : at + 4] = struct.pack("<I", self._rng.choice(NUMBERS) & 0xFFFFFFFF)
        return bytes(data)


def _mutated(rng: random.Random, message: bytes, others: list[bytes]) -> bytes:
    """Bytes or parts of the message changed, lost, doubled, or those of another; at times all by chance."""
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(200))
    data = bytearray(message)
    for _ in range(rng.randrange(1, 6)):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        match rng.randrange(6):
            case 0 if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[rng.randrange(len(data))] = rng.choice(BYTES)
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 12))
            case 3:
                del data[at : min(end, at + 8)]
            case 4:
                data[at:at] = data[at:end]
            case 5:
                data[at:end] = rng.choice(others)[at:end]
    return bytes(data[:16_000])


def _by_attach(daemon: Path, rng: random.Random, outcomes: Counter[str]) -> None:
    right = [attach_request(size, ring=bool(size)) for size in (0, 4096, 1 << 20)]
    for _ in range(BATCH):
        packet = _mutated(rng, rng.choice(right), right)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connect(connection, attach_socket(daemon), CALL_S)
            if packet:
                connection.send(packet)
            else:
                connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(65536)
            reply = attach_pb2.AttachReply.FromString(answer)
            if error := reply.refused.error:
                assert by_name(error).__name__ == error != "HillInferError"
            else:
                assert not packet or reply.HasField("accepted")
            outcomes["attach: " + (TYPED if error else DONE)] += 1


def _by_grpc(daemon: Path, rng: random.Random, outcomes: Counter[str]) -> None:
    with RawClient(daemon, 4 << 20) as client:
        context = client.open(SHAPE)
        client.append(context, 0, 0, ROWS)
        right = [(name, each) for name, found in right_requests(client, context).items() for each in found]
        mutations = _Mutations(rng, [message for _, message in right])
        # Those without fields are as good as any other; of the administrator's, those that change nothing.
        services = [f"ColdPool/{method}" for method, _ in right]
        services += ["ColdPool/Status", "ColdPool/ListContexts", "Admin/CecStatus", "Admin/CecLoad"]
        metadata = ((TOKEN_KEY, client.token),)
        for _ in range(BATCH):
            number = rng.randrange(len(services))
            data = mutations.of(number % len(right))
            call = client.channel.stream_stream(f"/hillinfer.v1.{services[number]}")
            try:
                list(call(iter([data]), timeout=CALL_S, metadata=metadata))
                outcomes["grpc: " + DONE] += 1
            except grpc.RpcError as error:
                outcomes["grpc: " + _typed(error, data)] += 1


def _typed(error: grpc.RpcError, data: bytes) -> str:
    name = dict(error.trailing_metadata()).get(ERROR_KEY, "")
    assert name not in ("", "HillInferError"), (error, data)
    assert error.code() is grpc.StatusCode[by_name(name).status], (error, data)
    return TYPED


def _by_ring(daemon: Path, rng: random.Random, outcomes: Counter[str]) -> None:
    ring, mutations = _ring(daemon, rng)
    left, ticket = BATCH, 0
    while left:
        batch = min(left, rng.randrange(1, ENTRIES + 1))
        if rng.random() < 0.1:
            # Counters by chance, mostly senseless: that ends the session.
            for where in (0, 64, 128, 192):
                struct.pack_into("<I", ring.memory.buffer(where, 4), 0, rng.randrange(20))
            with suppress(BrokenPipeError):
                ring_doorbell(ring.fds.submitted)
            ring.close()
            ring, mutations = _ring(daemon, rng)
            outcomes["ring: ended"] += batch
        else:
            for _ in range(batch):
                ticket += 1
                number = rng.randrange(len(RING_METHODS))
                code = (
                    RING_METHODS[number]
                    if rng.random() < 0.9
                    else rng.choice([0, 1, 2, 3, 77, (1 << 32) - 1])
                )
                timeout = rng.choice([0, 0, 1, 60_000, (1 << 32) - 1])
                ring.submissions.put(Entry(ticket, code, timeout, mutations.of(number)[:PAYLOAD_BYTES]))
            ring_doorbell(ring.fds.submitted)
            for entry in ring.completed(batch):
                if entry.code == Outcome.refused:
                    error = ring.refusal(entry).error
                    assert by_name(error).__name__ == error != "HillInferError"
                outcomes["ring: " + (TYPED if entry.code == Outcome.refused else DONE)] += 1
        left -= batch
    ring.close()


CODES = [0, 1, 2, 3, 4, 5, 77, (1 << 32) - 1]
RING_METHODS = [Method.Evaluate, Method.Append, Method.Fetch, Method.Fetch, Method.EvaluatePacked]


def _ring(daemon: Path, rng: random.Random) -> tuple[RawRing, _Mutations]:
    """A session with a ring and a context of zeros, and requests of it, in the order of their methods."""
    ring = RawRing(daemon)
    shape = pb.OpenContextRequest(layers=1, kv_heads=2, head_dim=64, dtype=1, precision=1)
    with grpc.insecure_channel(ring.accepted.grpc_address) as channel:
        metadata = ((TOKEN_KEY, ring.accepted.token),)
        opened = ColdPoolStub(channel).OpenContext(shape, metadata=metadata, timeout=CALL_S)
    context = opened.context_id

    def region(offset: int, length: int) -> pb.Region:
        return pb.Region(offset=offset, length=length, generation=ring.accepted.arena_generation)

    rows = region(0, TOKENS * SHAPE.kv_heads * SHAPE.row_bytes)
    append = pb.AppendRequest(context_id=context, tokens=TOKENS, rows=rows)
    ring.submissions.put(Entry(0, Method.Append, 0, append.SerializeToString()))
    ring_doorbell(ring.fds.submitted)
    assert ring.completed(1)[0].code == Outcome.answered
    item = pb.Evaluation(
        context_id=context, end_token=TOKENS, k=8, query=region(0, 512), ids=region(4096, 64)
    )
    item.rows.CopyFrom(region(1 << 18, 8 * SHAPE.row_bytes))
    ids = pb.Ids(count_per_head=[2, 2], ids=region(0, 16))
    every = [packed.Region(*each) for each in ((0, 512), (4096, 64), (0, 0), (8192, 64), (1 << 18, 4096))]
    one = packed.Item(context, 0, TOKENS, 8, *every)
    again = packed.Request(0, 2, 1, ring.accepted.arena_generation, [one, one])
    return ring, _Mutations(
        rng,
        [
            pb.EvaluateRequest(query_heads=2, reduction=1, evaluations=[item] * 3),
            pb.AppendRequest(context_id=context, first_token=TOKENS, tokens=64, rows=region(0, 32768)),
            pb.FetchRequest(context_id=context, range=pb.TokenRange(count=16), rows=rows),
            pb.FetchRequest(context_id=context, by_ids=ids, rows=region(1 << 18, 4 * SHAPE.row_bytes)),
            bytes(packed.pack_request(again)),
        ],
    )
