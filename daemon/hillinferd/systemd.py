"""What the daemon tells systemd and takes from it; where systemd did not start it, nothing happens.

systemd-python (extra ``systemd``) is imported only where systemd speaks to this process.
"""

from __future__ import annotations

import importlib
import os
import socket
from pathlib import Path
from types import ModuleType

from hillinfer_core.errors import ConfigError


def notify(*states: str) -> None:
    """Tell the service manager ``states``, for example ``READY=1``; see sd_notify(3)."""
    if "NOTIFY_SOCKET" in os.environ and (daemon := _library()):
        daemon.notify("\n".join(states))


def watchdog_s() -> float | None:
    """Return the seconds within which ``WATCHDOG=1`` must be told again and again; None if nobody waits."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return int(os.environ["WATCHDOG_USEC"]) / 1e6
    except (KeyError, ValueError):
        return None


def listening_socket(path: Path) -> socket.socket | None:
    """Take the socket at ``path`` that systemd listens on for this process, not blocking; None without one.

    The second call returns None: the environment that tells of it is cleared, as children must not see it.
    Raises :class:`ConfigError` if systemd listens on something else.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    daemon = _library()
    if daemon is None:
        raise ConfigError(
            "systemd hands over a socket, but systemd-python is not installed; "
            "pip install 'hillinfer[systemd]', or stop hillinferd.socket"
        )
    descriptors = list(daemon.listen_fds_with_names())
    if len(descriptors) != 1 or not daemon.is_socket_unix(
        descriptors[0], socket.SOCK_SEQPACKET, 1, str(path)
    ):
        raise ConfigError(
            f"systemd hands over something else than one socket that listens at {path}; "
            f"have one ListenSequentialPacket={path} in hillinferd.socket, or change runtime_dir"
        )
    sock = socket.socket(fileno=descriptors[0])
    sock.setblocking(False)
    return sock


def _library() -> ModuleType | None:
    try:
        return importlib.import_module("systemd.daemon")
    except ImportError:
        return None
