"""What the daemon asks of Linux about its own process, its directory and its lock."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import stat
from pathlib import Path

from hillinfer_core.errors import AlreadyRunning, ConfigError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_TIMERSLACK = 29

DESCRIPTORS = 65536
"""As hillinferd.service has: five for each session, one for each gRPC connection, and some. Our choice."""

_LONGEST_SOCKET_PATH = 107  # sun_path in sys/un.h, less the final zero


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send signal ``number`` when the thread that started this process ends."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        raise SystemExit(1)


def sleep_precisely() -> None:
    """Have the kernel wake this thread, and those that it starts, as close to the time as it can.

    By default it may be 50 us late, to wake several at once.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_TIMERSLACK) failed")


def raise_descriptor_limit() -> None:
    """Allow this process as many descriptors as it may allow itself, up to :data:`DESCRIPTORS`.

    The soft limit that a shell gives, often 1024, is for programs that call select(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def make_runtime_dir(directory: Path) -> None:
    """Make the directory of the sockets, mode 0700, unless it is there.

    Raises :class:`ConfigError` if it cannot be made or written, if others could replace the sockets in it, or
    if it is too deep for a socket's path.
    """
    longest = len(os.fsencode(directory / "attach.sock"))
    if longest > _LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"runtime_dir: socket paths in {directory} have {longest} bytes, "
            f"Linux allows {_LONGEST_SOCKET_PATH}; choose a shorter directory"
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"runtime_dir: cannot make {directory}: {error.strerror}") from None
    status = directory.stat()
    writable = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
    if status.st_uid not in (0, os.getuid()) or writable:
        # Whoever puts other sockets there poses as this daemon. A group is the choice of who made it.
        raise ConfigError(
            f"runtime_dir: {directory}, mode {status.st_mode & 0o7777:o}, belongs to user {status.st_uid}: "
            "others could replace the sockets in it; choose a directory that only you can write"
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"runtime_dir: {directory} is not writable by this user")


class RuntimeLock:
    """The right to serve in a runtime directory, held from construction until the process ends.

    Raises :class:`AlreadyRunning` if another process has it.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "lock"
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"runtime_dir: cannot open {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise AlreadyRunning(
                f"another hillinferd (pid {holder}) serves in {directory}; "
                "stop it, or choose another --runtime-dir"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
