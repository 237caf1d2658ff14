"""The worker's native way from packet to answer, against its own way through Python."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hillinfer_core.arena import Arena, create_arena
from hillinfer_core.layout import DType, Precision, Reduction, Shape
from hillinfer_core.packed import Item, Region, unpack_results
from hillinferd.domain.extents import GRANULE, ExtentAllocator
from hillinferd.domain.placement import extend
from hillinferd.driver.settings import DriverSettings
from hillinferd.worker import messages, packets
from hillinferd.worker.loop import serve
from hillinferd.worker.operations import Operations

ARENA = 8 << 20
CAPACITY = 64 << 20
QUERY, HELD, IDS, SCORES, ROWS = 0, 64 << 10, 1 << 20, 2 << 20, 4 << 20
EMPTY = 0xFFFFFFFF


class Worker:
    """A worker's loop in a thread, its other end, and one client's arena; ``carried`` went through Python."""

    def __init__(self, pool: Path, key_memory: int = 16 << 20) -> None:
        self.carried: list[messages.Request] = []
        self.pool = pool
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.settimeout(60)
        settings = DriverSettings("host", str(pool), CAPACITY, keep=True, key_memory=key_memory)
        self._thread = threading.Thread(target=serve, args=(self._theirs, settings))
        self._thread.start()
        self._received = packets.Packets(self._ours)
        assert isinstance(self._received.reply(), messages.Ready)
        self._fd = create_arena(ARENA, "test")
        self.arena = Arena(self._fd, ARENA)
        self._allocator = ExtentAllocator(CAPACITY, reserved=GRANULE)
        self._placed: dict[int, list[Any]] = {}
        self._tokens: dict[int, int] = {}
        self.done(messages.AttachArena(1, ARENA), self._fd)

    def ask(self, request: messages.Request, fd: int | None = None) -> messages.Reply:
        packet = packets.encode(request)
        if fd is None:
            self._ours.send(packet)
        else:
            socket.send_fds(self._ours, [packet], [fd])
        reply = self._received.reply()
        assert reply is not None
        return reply

    def done(self, request: messages.Request, fd: int | None = None) -> messages.Done:
        reply = self.ask(request, fd)
        assert isinstance(reply, messages.Done), reply
        return reply

    def open(self, shape: Shape) -> None:
        self._placed.clear()
        self._tokens.clear()
        self.done(messages.OpenContext(7, shape))

    def append(self, shape: Shape, tokens: int, seed: int, layer: int = 0) -> None:
        first, placed = self._tokens.get(layer, 0), self._placed.setdefault(layer, [])
        covered = placed[-1].end_token if placed else 0
        new = extend(self._allocator, shape, covered, first + tokens)
        rows = np.random.default_rng(seed).standard_normal((shape.kv_heads, tokens, 2, shape.head_dim))
        self.arena.view(0, rows.shape, np.float16)[:] = rows
        region = Region(0, rows.size * 2)
        self.done(messages.Append(1, 7, layer, first, tokens, region, new))
        placed += new
        self._tokens[layer] = first + tokens

    def forget(self) -> None:
        self.done(messages.DropContext(99))

    def close(self) -> None:
        self._ours.close()
        self._thread.join(60)
        self._theirs.close()
        os.close(self._fd)


@pytest.fixture(params=["memory", "file"])
def worker(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Worker]:
    carry_out = Operations.carry_out
    with tempfile.TemporaryDirectory(dir="/dev/shm" if request.param == "memory" else tmp_path) as directory:
        found = Worker(Path(directory) / "pool")

        def spied(self: Operations, asked: messages.Request, fd: int | None) -> messages.Reply:
            found.carried.append(asked)
            return carry_out(self, asked, fd)

        monkeypatch.setattr(Operations, "carry_out", spied)
        yield found
        found.close()


def outputs(worker: Worker) -> np.ndarray:
    return worker.arena.view(IDS, (ARENA - IDS,), np.uint8)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("reduction", [Reduction.sum, Reduction.max])
def test_the_answer_and_the_arena_are_the_same(
    worker: Worker, precision: Precision, reduction: Reduction
) -> None:
    shape = Shape(1, 2, 64, DType.float16, precision)
    rng = np.random.default_rng(5)
    worker.open(shape)
    for number in range(12):
        worker.append(shape, int(rng.integers(1, 5)) * 128, number)
        tokens = worker._tokens[0]
        first = int(rng.integers(0, tokens - 1)) if number % 2 else 0
        end = int(rng.integers(first + 1, tokens + 1)) if number % 3 else tokens
        k = int(rng.integers(1, min(60, end - first) + 1))
        slots = int(rng.integers(0, 50))
        room = int(rng.integers(0, 2 * k + 1)) * shape.row_bytes
        worker.arena.view(QUERY, (8, 64), np.float32)[:] = rng.standard_normal((8, 64))
        held = rng.integers(0, tokens, (2, slots)).astype(np.uint32)
        held[rng.random(held.shape) < 0.2] = EMPTY
        worker.arena.view(HELD, held.shape, np.uint32)[:] = held
        item = Item(
            7, first, end, k,
            Region(QUERY, 8 * 64 * 4), Region(IDS, 2 * k * 4), Region(SCORES, 2 * k * 4 * (number % 2)),
            Region(HELD, held.nbytes), Region(ROWS, room),
        )  # fmt: skip
        ask = messages.Evaluate(1, 0, 8, reduction, [item])
        answers, arenas = [], []
        worker.forget()
        worker.carried.clear()
        for _ in range(3):
            outputs(worker)[:] = 0xAA
            answers.append(worker.done(ask))
            arenas.append(outputs(worker).copy())
        assert len(worker.carried) == 1
        assert len({answer.key_bytes for answer in answers}) == 1
        # Another range of the same layer, whose keys may have to be brought in, and the one before again.
        other = ask._replace(evaluations=[item._replace(first_token=0, end_token=tokens)])
        ranked = worker.done(other)
        outputs(worker)[:] = 0xAA
        answers.append(worker.done(ask))
        arenas.append(outputs(worker).copy())
        worker.forget()
        again = worker.done(other)
        assert _untimed(again)[1] == _untimed(ranked)[1]
        for answer, arena in zip(answers, arenas, strict=True):
            assert _untimed(answer) == _untimed(answers[0])
            np.testing.assert_array_equal(arena, arenas[0])


def _untimed(done: messages.Done) -> tuple[Any, ...]:
    results = [result._replace(scan_s=0.0) for result in unpack_results(done.evaluated)]
    return replace(done, evaluated=b"", key_bytes=0), results


def evaluation(worker: Worker) -> messages.Evaluate:
    """Return an evaluation of a new context, asked once."""
    shape = Shape(1, 2, 64, DType.float16, Precision.int8)
    worker.open(shape)
    worker.append(shape, 256, 0)
    worker.arena.view(QUERY, (2, 64), np.float32)[:] = np.random.default_rng(1).standard_normal((2, 64))
    item = Item(
        7, 0, 256, 8, Region(QUERY, 512), Region(IDS, 64), Region(0, 0), Region(0, 0), Region(ROWS, 16 * 256)
    )
    ask = messages.Evaluate(1, 0, 2, Reduction.sum, [item])
    worker.done(ask)
    worker.carried.clear()
    worker.done(ask)
    assert not worker.carried
    return ask


def test_what_fails_says_why_as_ever(worker: Worker) -> None:
    ask = evaluation(worker)
    (item,) = ask.evaluations
    query = worker.arena.view(QUERY, (2, 64), np.float32)
    query[1, 3] = np.nan
    reply = worker.ask(ask)
    assert isinstance(reply, messages.Failed)
    assert "NaN" in reply.message
    query[1, 3] = 1.0
    reply = worker.ask(ask._replace(evaluations=[item._replace(end_token=257)]))
    assert isinstance(reply, messages.Failed)
    assert "holds 256 tokens, not 257" in reply.message
    worker.done(ask)
    # A byte of every row, in the pool itself.
    with open(worker.pool, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        for offset in range(GRANULE + 17, size, 256):
            file.seek(offset)
            file.write(b"\x5a\xa5")
    for _ in range(2):
        reply = worker.ask(ask)
        assert isinstance(reply, messages.Failed)
        assert reply.error == "CorruptData"


def test_what_is_gone_is_not_answered(worker: Worker) -> None:
    ask = evaluation(worker)
    worker.done(messages.DropContext(7))
    reply = worker.ask(ask)
    assert isinstance(reply, messages.Failed)
    assert reply.error == "UnknownContext"
    ask = evaluation(worker)
    worker.done(messages.DetachArena(1))
    assert isinstance(worker.ask(ask), messages.Failed)


def test_keys_that_are_not_in_memory_are_read_each_time(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "pool", key_memory=192 << 10)
    try:
        shape = Shape(1, 2, 64, DType.float16, Precision.int8)
        worker.open(shape)
        for number in range(8):
            worker.append(shape, 256, number)
        worker.arena.view(QUERY, (2, 64), np.float32)[:] = np.random.default_rng(1).standard_normal((2, 64))
        regions = (Region(QUERY, 512), Region(IDS, 64), Region(0, 0), Region(0, 0), Region(ROWS, 16 * 256))
        ask = messages.Evaluate(1, 0, 2, Reduction.sum, [Item(7, 0, 2048, 8, *regions)])
        answers = [worker.done(ask) for _ in range(3)]
        assert answers[0].traffic.streamed
        assert {_untimed(answer)[0].traffic.streamed for answer in answers} == {answers[0].traffic.streamed}
    finally:
        worker.close()
