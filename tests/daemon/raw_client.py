"""The daemon's two sockets without the client library, and daemons to talk to."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from hillinfer_core import protocol
from hillinfer_core.arena import Arena
from hillinfer_core.attach_socket import connect
from hillinfer_core.layout import PAGE, Reduction, Shape
from hillinfer_core.v1 import attach_pb2
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinfer_core.v1.cold_pool_pb2_grpc import ColdPoolStub

CALL_S = 60.0


class Refused(Exception):  # noqa: N818
    def __init__(self, error: str, message: str, code: grpc.StatusCode | None = None) -> None:
        super().__init__(f"{error}: {message}")
        self.error, self.message, self.code = error, message, code


def attach_raw(runtime_dir: Path, packet: bytes) -> tuple[socket.socket, attach_pb2.AttachReply, list[int]]:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connect(connection, protocol.attach_socket(runtime_dir), CALL_S)
    connection.send(packet)
    data, fds, _, _ = socket.recv_fds(connection, protocol.MAX_PACKET, 4)
    return connection, attach_pb2.AttachReply.FromString(data), fds


def attach_request(arena_bytes: int = 0, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "protocol_version": protocol.PROTOCOL_VERSION,
        "layout_version": protocol.LAYOUT_VERSION,
        "client_name": "raw",
        "arena_bytes": arena_bytes,
    }
    return attach_pb2.AttachRequest(**{**fields, **changes}).SerializeToString()


class RawClient:
    """One session; regions are laid out by hand through :meth:`take`."""

    def __init__(self, runtime_dir: Path, arena_bytes: int = 4 << 20) -> None:
        self.connection, reply, fds = attach_raw(runtime_dir, attach_request(arena_bytes))
        if reply.WhichOneof("outcome") == "refused":
            self.connection.close()
            raise Refused(reply.refused.error, reply.refused.message)
        self.accepted = reply.accepted
        self.arena = Arena(fds[0], self.accepted.arena_bytes, verify=True) if fds else None
        for fd in fds:
            os.close(fd)
        self.token = self.accepted.token
        self.channel = grpc.insecure_channel(self.accepted.grpc_address)
        self.stub = ColdPoolStub(self.channel)
        self._next = 0
        self._append_limits: dict[int, int] = {}

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self.connection.close()

    def call(self, method: str, request: Any, timeout: float = CALL_S) -> Any:
        metadata = ((protocol.TOKEN_KEY, self.token),) if self.token else ()
        try:
            if method == "Evaluate":
                return next(self.stub.Evaluate(iter([request]), timeout=timeout, metadata=metadata))
            return getattr(self.stub, method)(request, timeout=timeout, metadata=metadata)
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            raise Refused(trailing.get(protocol.ERROR_KEY, ""), error.details() or "", error.code()) from None

    def reset(self) -> None:
        self._next = 0

    def take(self, shape: tuple[int, ...], dtype: Any, align: int = 64) -> tuple[pb.Region, np.ndarray]:
        assert self.arena is not None
        offset = -(-self._next // align) * align
        view = self.arena.view(offset, shape, dtype)
        self._next = offset + view.nbytes
        return self.region(offset, view.nbytes), view

    def region(self, offset: int, length: int) -> pb.Region:
        return pb.Region(offset=offset, length=length, generation=self.accepted.arena_generation)

    def open(self, shape: Shape) -> int:
        response = self.open_named(shape)
        assert response.append_unit == shape.append_unit
        return response.context_id

    def open_named(self, shape: Shape, **kind: Any) -> pb.OpenContextResponse:
        request = pb.OpenContextRequest(
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype.to_proto(),
            precision=shape.precision.to_proto(),
            **kind,
        )
        opened = self.call("OpenContext", request)
        self._append_limits[opened.context_id] = opened.append_limit
        return opened

    def save(self, context: int) -> None:
        self.call("SaveContext", pb.SaveContextRequest(context_id=context))

    def close_context(self, context: int) -> None:
        self.call("CloseContext", pb.CloseContextRequest(context_id=context))

    def durable(self) -> dict[str, pb.DurableContext]:
        return {item.name: item for item in self.call("ListContexts", pb.ListContextsRequest()).contexts}

    def delete(self, name: str) -> int:
        request = pb.DeleteContextRequest(name=name, uid=os.getuid())
        return self.call("DeleteContext", request).freed_bytes

    def append(
        self,
        context: int,
        layer: int,
        first: int,
        rows: np.ndarray,
        *,
        tail: bool = False,
        whole: bool = False,
    ) -> pb.AppendResponse:
        """In as many appends as the daemon's limit asks for, unless `whole`; returns the last answer."""
        limit = self._append_limits.get(context, 0)
        while limit and not whole and rows.shape[1] > limit:
            self.append(context, layer, first, rows[:, :limit], tail=tail)
            first, rows = first + limit, rows[:, limit:]
        self.reset()
        region, view = self.take(rows.shape, rows.dtype, PAGE)
        view[...] = rows
        request = pb.AppendRequest(
            context_id=context,
            layer=layer,
            first_token=first,
            tokens=rows.shape[1],
            rows=region,
            tail=tail,
        )
        return self.call("Append", request)

    def fetch_range(self, context: int, shape: Shape, layer: int, first: int, count: int) -> np.ndarray:
        self.reset()
        region, view = self.take((shape.kv_heads, count, 2, shape.head_dim), shape.dtype.storage)
        which = pb.TokenRange(first_token=first, count=count)
        self.call("Fetch", pb.FetchRequest(context_id=context, layer=layer, range=which, rows=region))
        return view.copy()

    def fetch_tail(self, context: int, shape: Shape, layer: int, count: int) -> np.ndarray:
        self.reset()
        region, view = self.take((shape.kv_heads, count, 2, shape.head_dim), shape.dtype.storage)
        request = pb.FetchRequest(context_id=context, layer=layer, tail=pb.Tail(), rows=region)
        self.call("Fetch", request)
        return view.copy()

    def fetch_ids(self, context: int, shape: Shape, layer: int, ids: list[list[int]]) -> np.ndarray:
        self.reset()
        flat = np.array([token for head in ids for token in head], np.uint32)
        ids_region, ids_view = self.take(flat.shape, np.uint32)
        ids_view[...] = flat
        region, view = self.take((len(flat), 2, shape.head_dim), shape.dtype.storage)
        by_ids = pb.Ids(count_per_head=[len(head) for head in ids], ids=ids_region)
        self.call("Fetch", pb.FetchRequest(context_id=context, layer=layer, by_ids=by_ids, rows=region))
        return view.copy()

    def evaluate(
        self,
        context: int,
        shape: Shape,
        layer: int,
        query: np.ndarray,
        k: int,
        first: int,
        end: int,
        *,
        held: np.ndarray | None = None,
        room: int = 0,
        reduction: Reduction = Reduction.sum,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, pb.EvaluationResult]:
        """Returns (ids, scores, rows brought, result); `room` rows fit."""
        self.reset()
        query_region, query_view = self.take(query.shape, np.float32)
        query_view[...] = query
        ids_region, ids = self.take((shape.kv_heads, k), np.uint32)
        scores_region, scores = self.take((shape.kv_heads, k), np.int32)
        item = pb.Evaluation(
            context_id=context,
            first_token=first,
            end_token=end,
            k=k,
            query=query_region,
            ids=ids_region,
            scores=scores_region,
        )
        if held is not None:
            held_region, held_view = self.take(held.shape, np.uint32)
            held_view[...] = held
            item.held.CopyFrom(held_region)
        rows = np.empty((0, 2, shape.head_dim), shape.dtype.storage)
        if room:
            rows_region, rows = self.take((room, 2, shape.head_dim), shape.dtype.storage)
            item.rows.CopyFrom(rows_region)
        request = pb.EvaluateRequest(
            layer=layer, query_heads=len(query), reduction=reduction.to_proto(), evaluations=[item]
        )
        result = self.call("Evaluate", request).results[0]
        return ids.copy(), scores.copy(), rows[: result.rows_brought].copy(), result

    def status(self) -> pb.StatusResponse:
        return self.call("Status", pb.StatusRequest())


@contextmanager
def running_daemon(runtime_dir: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A daemon that is ready; its lines so far are in `log_of`. Stopped, or killed if it does not."""
    runtime_dir.mkdir(parents=True, exist_ok=True)
    process = spawn(runtime_dir, *flags)
    try:
        wait_for(lambda: process.poll() is not None or " ready " in log_of(runtime_dir), 60)
        assert process.poll() is None, log_of(runtime_dir)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def spawn(runtime_dir: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hillinferd", "--runtime-dir", str(runtime_dir), *flags]
    if not {"--pool-capacity", "--config"} & set(flags):
        command += ["--pool-capacity", "1GiB"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(runtime_dir)}
    with (runtime_dir / "log").open("a") as log:
        return subprocess.Popen(command, stderr=log, text=True, env=environment)


def log_of(runtime_dir: Path) -> str:
    return (runtime_dir / "log").read_text()


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        select.select([], [], [], 0.02)


def random_rows(rng: np.random.Generator, shape: Shape, tokens: int) -> np.ndarray:
    numbers = rng.standard_normal((shape.kv_heads, tokens, 2, shape.head_dim)).astype(np.float32)
    if shape.dtype.value == "bfloat16":
        return (numbers.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return numbers.astype(shape.dtype.storage)
