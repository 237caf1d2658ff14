"""A daemon of one's own, for when none is reachable and for tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from hillinfer import wire
from hillinfer_core import protocol
from hillinfer_core.errors import DaemonUnavailable, HillInferError

_START_S = 15.0
_STOP_S = 10.0
_RETRY_S = 0.02
_LOG_LINES = 10
# sun_path holds 108 bytes; a long $TMPDIR leaves too few for the socket's name.
_LONGEST_TMPDIR = 64


class PrivateDaemon:
    """Runs hillinferd on its embedded default with a runtime directory of its own.

    Use it with ``with``: it starts on entry, which blocks until the daemon
    answers, and stops on exit. It also stops when the thread that started it
    dies, so start it in one that lives as long as the daemon is needed.

    `pool_capacity` and `evaluation_keys_dram` are bytes, `pool_dir` the
    directory of the cold pool's file, which goes away with the daemon. Only with
    it are there durable contexts, until then. `profile` paces the drive to that of
    another, such as "smartssd": the pool should then lie in memory (/dev/shm), which is
    faster. None leaves the daemon's defaults. Needs the ``daemon`` extra.
    """

    def __init__(
        self,
        pool_capacity: int | None = None,
        evaluation_keys_dram: int | None = None,
        pool_dir: Path | None = None,
        profile: str | None = None,
    ) -> None:
        self._pool_capacity = pool_capacity
        self._evaluation_keys_dram = evaluation_keys_dram
        self._pool_dir = pool_dir
        self._profile = profile
        self._runtime_dir: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """The attach socket, for `Session.connect`."""
        return protocol.attach_socket(self._running()[1])

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        return self._running()[0].pid

    def __enter__(self) -> Self:
        temporary = tempfile.gettempdir()
        self._runtime_dir = Path(
            tempfile.mkdtemp(
                prefix="hillinfer-", dir=temporary if len(temporary) <= _LONGEST_TMPDIR else "/tmp"
            )
        )
        try:
            with open(self._log, "wb") as log:
                self._process = subprocess.Popen(
                    self._command(self._runtime_dir),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # the terminal's ^C is for the client, which stops it in order
                )
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _command(self, runtime_dir: Path) -> list[str]:
        # -P: what lies in the directory that this runs in is no module of the daemon's.
        command = [sys.executable, "-P", "-m", "hillinferd"]
        command += ["--runtime-dir", str(runtime_dir), "--die-with-parent"]
        if self._pool_capacity is not None:
            command += ["--pool-capacity", str(self._pool_capacity)]
        if self._evaluation_keys_dram is not None:
            command += ["--evaluation-keys-dram", str(self._evaluation_keys_dram)]
        if self._pool_dir is not None:
            command += ["--pool", str(self._pool)]
        if self._profile is not None:
            command += ["--profile", self._profile]
        return command

    @property
    def _log(self) -> Path:
        assert self._runtime_dir is not None
        return self._runtime_dir / "hillinferd.log"

    @property
    def _pool(self) -> Path:
        assert self._pool_dir is not None
        assert self._runtime_dir is not None
        return self._pool_dir / f"{self._runtime_dir.name}.pool"

    def _running(self) -> tuple[subprocess.Popen[bytes], Path]:
        if self._process is None or self._runtime_dir is None:
            raise DaemonUnavailable("the private daemon is not running; use it in a with statement")
        return self._process, self._runtime_dir

    def _wait(self) -> None:
        process, _ = self._running()
        deadline = time.monotonic() + _START_S
        while True:
            try:
                connection, _, _, _ = wire.attach(self.socket, 0, "start-up check", timeout_s=1.0)
            except HillInferError as error:
                last = error
            else:
                connection.close()
                return
            if process.poll() is not None:
                raise DaemonUnavailable(
                    f"hillinferd ended with code {process.returncode} while starting"
                    f" (is hillinfer[daemon] installed?):\n{self._log_tail()}"
                )
            if time.monotonic() > deadline:
                raise DaemonUnavailable(
                    f"hillinferd did not answer within {_START_S:g} s ({last}):\n{self._log_tail()}"
                )
            time.sleep(_RETRY_S)

    def _log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:])

    def _stop(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._runtime_dir is not None:
            if self._pool_dir is not None:
                # The pool and its catalogue.
                for path in self._pool_dir.glob(f"{self._pool.name}*"):
                    path.unlink(missing_ok=True)
            shutil.rmtree(self._runtime_dir, ignore_errors=True)
            self._runtime_dir = None
