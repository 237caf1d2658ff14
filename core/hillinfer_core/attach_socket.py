"""Connecting to the attach socket."""

from __future__ import annotations

import socket
import struct
from pathlib import Path


def connect(connection: socket.socket, path: Path, timeout_s: float) -> None:
    """Connect to ``path``, and give the connection the timeout for what follows.

    Blocks for at most ``timeout_s`` seconds (1 ms to 11 days). Raises ``TimeoutError`` after these, and what
    connect(2) raises.
    """
    # With Python's own timeout, a daemon that many connect to at once would be an error at once.
    seconds, fraction = divmod(min(max(timeout_s, 1e-3), 1e6), 1)
    wait = struct.pack("ll", int(seconds), int(fraction * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
    try:
        connection.connect(str(path))
    except BlockingIOError:
        raise TimeoutError(f"{path} takes in no connection within {timeout_s:g} s") from None
    connection.settimeout(timeout_s)
