"""HillInfer without its library: two Unix sockets, gRPC and shared memory, as a client in any language would.

Attaches, appends the keys and values of 4,096 tokens, has them ranked by a query, fetches the winners' rows,
and checks both with numpy. Needs numpy, grpcio, the stubs that protoc makes of `proto/` (here those of
`hillinfer_core.v1`), and a daemon that runs. Run it as

    python examples/grpc_client.py [RUNTIME_DIR]
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from typing import Any

import grpc
import numpy as np

from hillinfer_core.v1 import attach_pb2, cold_pool_pb2, cold_pool_pb2_grpc

PROTOCOL_VERSION, LAYOUT_VERSION = 3, 2  # the daemon refuses a client of others, and names its own
PAGE = 4096
ARENA_BYTES = 8 << 20
DEADLINE_S = 20.0

KV_HEADS, HEAD_DIM = 2, 64
TOKENS = 4096
PLANTED = [5, 700, 1234, 2048, 3071, 3072, 4000, 4095]
"""Tokens whose keys look like the query: the best by far."""


class Arena:
    """The memory shared with the daemon. Messages name regions of it; the bytes are here."""

    def __init__(self, descriptor: int, accepted: attach_pb2.Accepted) -> None:
        self._memory = mmap.mmap(descriptor, accepted.arena_bytes)
        self._generation = accepted.arena_generation
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: Any) -> tuple[cold_pool_pb2.Region, np.ndarray]:
        """A region for an array, on a page of its own, and the array on it."""
        array = np.ndarray(shape, dtype, self._memory, self._used)
        region = cold_pool_pb2.Region(offset=self._used, length=array.nbytes, generation=self._generation)
        self._used += -(-array.nbytes // PAGE) * PAGE
        return region, array

    def reset(self) -> None:
        """Use it again from the start: only between calls."""
        self._used = 0


def attach(path: str) -> tuple[socket.socket, attach_pb2.Accepted, Arena]:
    """One packet there, one back, with the arena's descriptor; the connection is the session."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(DEADLINE_S)
    connection.connect(path)
    request = attach_pb2.AttachRequest(
        protocol_version=PROTOCOL_VERSION,
        layout_version=LAYOUT_VERSION,
        client_name="gRPC example",
        arena_bytes=ARENA_BYTES,
    )
    connection.send(request.SerializeToString())
    packet, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 1)
    reply = attach_pb2.AttachReply.FromString(packet)
    if reply.WhichOneof("outcome") != "accepted":
        raise SystemExit(f"refused: {reply.refused.error}: {reply.refused.message}")
    return connection, reply.accepted, Arena(descriptors[0], reply.accepted)


def append(call: Any, arena: Arena, opened: cold_pool_pb2.OpenContextResponse, rows: np.ndarray) -> None:
    """Rows [kv_heads, tokens, 2 (K, V), head_dim], in multiples of append_unit and at most append_limit."""
    for first in range(0, TOKENS, opened.append_limit):
        part = rows[:, first : first + opened.append_limit]
        arena.reset()
        region, staged = arena.take(part.shape, part.dtype)
        staged[...] = part
        request = cold_pool_pb2.AppendRequest(
            context_id=opened.context_id, layer=0, first_token=first, tokens=part.shape[1], rows=region
        )
        call("Append", request)


def evaluate(call: Any, arena: Arena, context_id: int, query: np.ndarray, k: int) -> np.ndarray:
    """The ids [kv_heads, k] of the tokens that the daemon ranks best, ascending in each head."""
    arena.reset()
    query_region, staged = arena.take(query.shape, np.float32)
    staged[...] = query
    ids_region, ids = arena.take((KV_HEADS, k), np.uint32)
    request = cold_pool_pb2.EvaluateRequest(
        layer=0, query_heads=len(query), reduction=cold_pool_pb2.REDUCTION_SUM
    )
    request.evaluations.add(
        context_id=context_id, first_token=0, end_token=TOKENS, k=k, query=query_region, ids=ids_region
    )
    call("Evaluate", request)
    return ids.copy()


def fetch(call: Any, arena: Arena, context_id: int, ids: np.ndarray) -> np.ndarray:
    """The rows [kv_heads, k, 2, head_dim] of the tokens `ids`."""
    arena.reset()
    ids_region, staged = arena.take(ids.shape, np.uint32)
    staged[...] = ids
    rows_region, rows = arena.take((*ids.shape, 2, HEAD_DIM), np.float32)
    by_ids = cold_pool_pb2.Ids(count_per_head=[ids.shape[1]] * KV_HEADS, ids=ids_region)
    request = cold_pool_pb2.FetchRequest(context_id=context_id, layer=0, by_ids=by_ids, rows=rows_region)
    call("Fetch", request)
    return rows.copy()


def main() -> None:
    runtime_dir = sys.argv[1] if len(sys.argv) > 1 else "/run/hillinfer"
    random = np.random.default_rng(0)
    query = random.standard_normal((KV_HEADS, HEAD_DIM), dtype=np.float32)
    rows = random.standard_normal((KV_HEADS, TOKENS, 2, HEAD_DIM), dtype=np.float32)
    rows[:, PLANTED, 0] = 2 * query[:, None]

    connection, accepted, arena = attach(os.path.join(runtime_dir, "attach.sock"))
    with connection, grpc.insecure_channel(accepted.grpc_address) as channel:
        stub = cold_pool_pb2_grpc.ColdPoolStub(channel)

        def call(method: str, request: Any) -> Any:
            options = {"metadata": (("hillinfer-token", accepted.token),), "timeout": DEADLINE_S}
            try:
                if method == "Evaluate":  # a stream: one answer for each question
                    return next(stub.Evaluate(iter([request]), **options))
                return getattr(stub, method)(request, **options)
            except grpc.RpcError as error:
                name = dict(error.trailing_metadata() or ()).get("hillinfer-error", error.code().name)
                raise SystemExit(f"{method}: {name}: {error.details()}") from None

        opened = call(
            "OpenContext",
            cold_pool_pb2.OpenContextRequest(
                layers=1,
                kv_heads=KV_HEADS,
                head_dim=HEAD_DIM,
                dtype=cold_pool_pb2.DTYPE_FLOAT32,
                precision=cold_pool_pb2.PRECISION_INT8,
            ),
        )
        append(call, arena, opened, rows)
        ids = evaluate(call, arena, opened.context_id, query, len(PLANTED))
        fetched = fetch(call, arena, opened.context_id, ids)

    products = np.einsum("hd,htd->ht", query, rows[:, :, 0])
    best = np.sort(np.argsort(products, axis=1)[:, -len(PLANTED) :], axis=1)
    for head, winners in enumerate(ids):
        print(f"KV head {head}: {winners.tolist()}")
    if not np.array_equal(ids, best):
        raise SystemExit(f"numpy ranks {best.tolist()} highest")
    if not np.array_equal(fetched, np.take_along_axis(rows, ids[:, :, None, None].astype(int), axis=1)):
        raise SystemExit("the rows are not those that were appended")
    print("numpy ranks the same tokens highest, and the rows are those that were appended")


if __name__ == "__main__":
    main()
