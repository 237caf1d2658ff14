"""A daemon whose express is watched, and sessions that ask it the same again and again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from raw_client import wait_for
from service_thread import Served, drive_settings, served

from hillinfer import Context, DType, EvaluateItem, Precision, Session, Shape
from hillinfer.ring import RingTransport, Submitted
from hillinfer_core.arena import Arena
from hillinfer_core.protocol import attach_socket
from hillinfer_core.ring import (
    RING_BYTES,
    Entry,
    Method,
)
from hillinferd.rpc.ring import RingServer
from hillinferd.service.drive import Drive
from hillinferd.service.express import Flight, Run
from hillinferd.service.work_queue import Piece

SHAPE = Shape(2, 2, 64, DType.float16, Precision.int8)
HELD = np.full((2, 4), 0xFFFFFFFF, np.uint32)
QUERY = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)


@dataclass
class Watched:
    """A daemon of the test's own: what the express carried, the queue's pieces, what those took over."""

    served: Served
    directory: Path
    runs: list[Run] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)

    @property
    def drive(self) -> Drive:
        return self.served.service.drives[0]

    @property
    def carried(self) -> int:
        return self.served.run(lambda: sum(len(run.seconds) for run in self.runs))

    @property
    def evaluated(self) -> int:
        """Evaluations that took a turn of the queue."""
        return self.served.run(lambda: sum(piece.operation == "evaluate" for piece in self.pieces))

    def check_flights(self) -> None:
        """One was taken over, unless something else of the loop broke in and all went through the queue."""
        assert len(self.flights) == 1 or self.evaluated > 1

    def connect(self) -> Asking:
        return Asking(Session.connect(attach_socket(self.directory), restart_s=0.2))

    @contextmanager
    def stopped(self) -> Iterator[int]:
        """Have the worker stand still."""
        pid = self.drive.worker.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield pid
        finally:
            os.kill(pid, signal.SIGCONT)


class Asking:
    """A session with a context that asks the same again and again."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.context = self.fill()

    def fill(self) -> Context:
        context = self.session.open_context(SHAPE)
        rng = np.random.default_rng(0)
        for layer in range(SHAPE.layers):
            keys, values = rng.standard_normal((2, 2, 256, 64)).astype(np.float16)
            context.append(layer, keys, values)
        return context

    def ask(self, layer: int = 0, first: int = 0, end: int = 256, query: np.ndarray = QUERY) -> np.ndarray:
        item = EvaluateItem(self.context, query, 8, first, end, HELD)
        return self.session.evaluate_and_bring(layer, [item])[0].ids

    @property
    def ring(self) -> RingTransport:
        return self.session._link._ring

    def packed(self) -> bytes:
        """Ask a few times, and return what went into the ring."""
        found: list[bytes] = []
        submit = self.ring.submit

        def spied(method: Method, payload: bytes, timeout_s: float) -> Submitted:
            found.append(payload)
            return submit(method, payload, timeout_s)

        self.ring.submit = spied
        self.ask()
        self.ask()
        self.ring.submit = submit
        return found[-1]

    def submit_and_wait(self, payloads: list[bytes]) -> list[Entry]:
        submitted = [self.ring.submit(Method.EvaluatePacked, payload, 30) for payload in payloads]
        return [self.ring.answer(each) for each in submitted]

    def taken(self, submitted: Submitted) -> bool:
        """Whether the daemon has taken a request, of a session that has submitted all by the ring."""
        return int(self.memory.view(64, (1,), "<u4")[0]) == submitted.ticket

    def under_way(self, threads: ThreadPoolExecutor) -> Future[np.ndarray]:
        """Ask, and return when the daemon has taken the request: its counter says so."""
        counter = self.memory.view(64, (1,), "<u4")
        before = int(counter[0])
        asked = threads.submit(self.ask)
        wait_for(lambda: int(counter[0]) != before, 60)
        return asked

    @property
    def memory(self) -> Arena:
        return Arena(self.fds.memory, RING_BYTES)

    @property
    def fds(self):
        return self.session._link._ring._fds

    def hung_up(self) -> bool:
        self.session._link._connection.settimeout(60)
        return self.session._link._connection.recv(1) == b""


@contextmanager
def watched(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, request_timeout_s: float = 60.0
) -> Iterator[Watched]:
    with served(runtime_dir, drive_settings("one", runtime_dir / "pool", request_timeout_s)) as service:
        found = Watched(service, runtime_dir)
        go_on = RingServer.go_on

        def spied(self: RingServer, flight: Flight) -> None:
            found.flights.append(flight)
            go_on(self, flight)

        monkeypatch.setattr(RingServer, "go_on", spied)
        service.run(
            lambda: service.service.observe(
                lambda _, piece, __: found.pieces.append(piece), lambda _, run: found.runs.append(run)
            )
        )
        yield found
