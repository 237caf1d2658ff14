"""A hillinferd in the guest, and a context whose content is known."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from kv_rows import random_kv, random_query
from rig import wait_for

from hillinfer import Context, DType, Precision, Session, Shape
from hillinfer_core.protocol import attach_socket

SHAPE = Shape(layers=2, kv_heads=2, head_dim=64, dtype=DType.float16, precision=Precision.int4)
UNIT = SHAPE.append_unit
TOKENS = 64 * UNIT
KEYS, VALUES = random_kv(SHAPE, TOKENS)
LABELS = {"text": "t"}


@dataclass
class Daemon:
    """A running hillinferd; ``log`` is what it says."""

    process: subprocess.Popen[bytes]
    directory: Path

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def connect(self) -> Session:
        return Session.connect(attach_socket(self.directory), timeout_s=100)

    @property
    def state(self) -> str:
        """What the daemon says of its only drive."""
        with Session.connect(attach_socket(self.directory), arena_bytes=0, timeout_s=100) as session:
            return session.status().drives[0].state


@contextmanager
def serving(pool: Path | None, state: Path, *flags: str) -> Iterator[Daemon]:
    """Run a daemon on ``pool`` (None: see ``flags``), its catalogue in ``state``; it must outlive its use."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    command = [sys.executable, "-m", "hillinferd", "--runtime-dir", directory, "--state-dir", state]
    if pool is not None:
        command += ["--pool", pool]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([*command, *flags], stdout=log, stderr=log)
    daemon = Daemon(process, directory)
    try:
        wait_for(
            "the daemon began to serve", lambda: " ready " in daemon.log or process.poll() is not None, 120
        )
        assert process.poll() is None, daemon.log
        yield daemon
        assert process.poll() is None, daemon.log
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def fill(context: Context, end: int = TOKENS) -> None:
    """Append up to token ``end`` in every layer; what is there is as it should be."""
    for layer in range(SHAPE.layers):
        held = context.length(layer)
        context.append(layer, KEYS[:, held:end], VALUES[:, held:end])


def save(session: Session, name: str) -> None:
    """Make a complete durable context."""
    context = session.open_context(SHAPE, durable=name, labels=LABELS)
    fill(context)
    context.save()
    context.close()


def check(context: Context) -> None:
    """Compare every row."""
    for layer in range(SHAPE.layers):
        rows = context.fetch_range(layer, 0, TOKENS)
        np.testing.assert_array_equal(rows[:, :, 0], KEYS)
        np.testing.assert_array_equal(rows[:, :, 1], VALUES)


def best(context: Context) -> np.ndarray:
    """Return ids and scores of a ranking."""
    selection = context.evaluate(0, random_query(4, SHAPE.head_dim), 50)
    return np.concatenate([selection.ids.astype(np.int64), selection.scores])
