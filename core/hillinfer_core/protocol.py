"""Names and numbers that client and daemon must agree on."""

from __future__ import annotations

import os
from pathlib import Path

PROTOCOL_VERSION = 3
"""Version of proto/hillinfer/v1 and of the attach exchange; checked at attach."""

LAYOUT_VERSION = 2
"""Version of rows and evaluation keys as :mod:`hillinfer_core.layout` lays them out; checked at attach."""

TOKEN_KEY = "hillinfer-token"
"""Metadata key that carries the session token with every call."""

ERROR_KEY = "hillinfer-error"
"""Trailing metadata key that carries the class name of an error in :mod:`hillinfer_core.errors`."""

MAX_PACKET = 65536
"""Largest packet, in bytes, on the attach socket."""

_SYSTEM_RUNTIME_DIR = Path("/run/hillinfer")


def default_runtime_dir() -> Path:
    """Return the directory of the sockets; it need not exist.

    The first that applies of ``$HILLINFER_RUNTIME_DIR``, ``/run/hillinfer`` if it exists,
    ``$XDG_RUNTIME_DIR/hillinfer`` and ``/tmp/hillinfer-<uid>``.
    """
    if chosen := os.environ.get("HILLINFER_RUNTIME_DIR"):
        return Path(chosen)
    if _SYSTEM_RUNTIME_DIR.is_dir():
        return _SYSTEM_RUNTIME_DIR
    if user_dir := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(user_dir) / "hillinfer"
    return Path(f"/tmp/hillinfer-{os.getuid()}")


def attach_socket(runtime_dir: Path) -> Path:
    """Return the path of the attach socket in ``runtime_dir``."""
    return runtime_dir / "attach.sock"


def grpc_socket(runtime_dir: Path) -> Path:
    """Return the path of the gRPC socket in ``runtime_dir``."""
    return runtime_dir / "grpc.sock"


def metrics_socket(runtime_dir: Path) -> Path:
    """Return the path of the socket of the daemon's metrics in ``runtime_dir``."""
    return runtime_dir / "metrics.sock"
