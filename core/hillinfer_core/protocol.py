"""Names and numbers that client and daemon must agree on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .errors import ConfigError

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

_TEMPORARY = Path("/tmp")


def default_runtime_dir() -> Path:
    """Return the directory of the sockets; it need not exist.

    The first that applies of ``$HILLINFER_RUNTIME_DIR``, ``/run/hillinfer`` if it exists,
    ``$XDG_RUNTIME_DIR/hillinfer`` and ``/tmp/hillinfer-<uid>``. Raises :class:`ConfigError` if the last is
    there and somebody else's: anyone may make it, and who serves in it would be taken for the daemon.
    """
    if chosen := os.environ.get("HILLINFER_RUNTIME_DIR"):
        return Path(chosen)
    if _SYSTEM_RUNTIME_DIR.is_dir():
        return _SYSTEM_RUNTIME_DIR
    if user_dir := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(user_dir) / "hillinfer"
    directory = _TEMPORARY / f"hillinfer-{os.getuid()}"
    with suppress(FileNotFoundError):
        if (owner := directory.lstat().st_uid) != os.getuid():
            raise ConfigError(
                f"{directory} belongs to user {owner}; have it removed, or set HILLINFER_RUNTIME_DIR"
            )
    return directory


def attach_socket(runtime_dir: Path) -> Path:
    """Return the path of the attach socket in ``runtime_dir``."""
    return runtime_dir / "attach.sock"


def grpc_socket(runtime_dir: Path) -> Path:
    """Return the path of the gRPC socket in ``runtime_dir``."""
    return runtime_dir / "grpc.sock"


def metrics_socket(runtime_dir: Path) -> Path:
    """Return the path of the socket of the daemon's metrics in ``runtime_dir``."""
    return runtime_dir / "metrics.sock"
