"""A daemon with a pool that stays, to be killed, stopped and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hillinfer import Session, errors
from hillinfer_core.protocol import attach_socket


class Restartable:
    """hillinferd with its runtime directory and pool in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = attach_socket(directory)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory / "log"

    def start(self) -> None:
        command = [sys.executable, "-m", "hillinferd", "--runtime-dir", str(self.directory)]
        command += ["--pool", str(self.directory / "pool"), "--pool-capacity", "64MiB", "--die-with-parent"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + 60
        while True:
            try:
                Session.connect(self.socket, arena_bytes=0, timeout_s=60).close()
            except errors.DaemonUnavailable:
                assert self.process is not None
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.02)
            else:
                return

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(60)

    def restart(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.end(number)
        self.start()

    @contextmanager
    def restarted_meanwhile(self, number: signal.Signals, after_s: float) -> Iterator[None]:
        """It is restarted ``after_s`` seconds from now, while what is inside goes on."""
        timer = threading.Timer(after_s, self.restart, (number,))
        timer.start()
        try:
            yield
        finally:
            timer.join()
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-4000:]

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid


@contextmanager
def restartable(directory: Path) -> Iterator[Restartable]:
    daemon = Restartable(directory)
    daemon.start()
    try:
        daemon.wait()
        yield daemon
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            os.kill(daemon.pid, signal.SIGCONT)
            daemon.end()
