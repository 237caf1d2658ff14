"""The daemon that a user's programs share: the first to need it starts it, and it goes when nobody does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from hillinfer.session import Session
from hillinfer_core.errors import DaemonUnavailable
from hillinfer_core.protocol import attach_socket, default_runtime_dir

IDLE_S = 10
"""Seconds without any session after which the daemon ends; what is saved stays in its pool."""
_START_S = 20.0
_RETRY_S = 0.02
_AGAIN_S = 1.0
_LOG_LINES = 10
_LONGEST_LOG = 1 << 20
# AlreadyRunning of hillinferd: another program's daemon was quicker, or is on its way out.
_NOT_ALONE = "another hillinferd"


def data_dir() -> Path:
    """Return the directory of the pool: ``$XDG_DATA_HOME/hillinfer``, or ``~/.local/share/hillinfer``."""
    chosen = os.environ.get("XDG_DATA_HOME")
    return (Path(chosen) if chosen else Path.home() / ".local" / "share") / "hillinfer"


def connect(name: str) -> Session:
    """Attach to the daemon at the usual place; where none answers, start one that keeps durable contexts.

    It outlives this process while others use it, and `IDLE_S` seconds more.
    Blocks until it answers. Raises DaemonUnavailable with the end of its log
    when it does not start.
    """
    socket = attach_socket(default_runtime_dir())
    log = data_dir() / "hillinferd.log"
    process: subprocess.Popen[bytes] | None = None
    deadline, next_start = time.monotonic() + _START_S, 0.0
    while True:
        try:
            return Session.connect(socket, name=name)
        except DaemonUnavailable as error:
            last = error
        now = time.monotonic()
        failed = process is not None and process.poll() is not None and _NOT_ALONE not in _tail(log)
        if failed or now > deadline:
            raise DaemonUnavailable(
                f"{last}; starting one failed (is hillinfer[daemon] installed?), {log} says:\n{_tail(log)}"
            )
        if (process is None or process.poll() is not None) and now > next_start:
            process, next_start = _start(log), now + _AGAIN_S
        time.sleep(_RETRY_S)


def _start(log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "hillinferd", "--pool", str(log.parent / "pool")]
    command += ["--exit-when-idle", str(IDLE_S)]
    try:
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Appended to, as two that start at once both write; begun anew before it is long.
        too_long = log.exists() and log.stat().st_size > _LONGEST_LOG
        with open(log, "wb" if too_long else "ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,  # it must not die with this program's terminal
            )
    except OSError as error:
        raise DaemonUnavailable(f"cannot start hillinferd: {error}") from error


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
