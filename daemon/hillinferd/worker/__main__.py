"""Entry point of the device worker process; started by the daemon only.

Arguments: descriptor of the socket to the daemon, pool file, capacity in bytes, 1 to keep the file's name,
log level.
"""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

from ..logs import set_up
from ..process import die_with_parent
from .loop import serve


def main() -> None:
    """Serve the daemon until it hangs up."""
    descriptor, pool, capacity, keep_name, level = sys.argv[1:]
    set_up(level)
    # Nothing less ends a worker that hangs; it has nothing to tidy up.
    die_with_parent(signal.SIGKILL)
    # The daemon decides when the worker stops, by hanging up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(descriptor)) as sock:
        serve(sock, Path(pool), int(capacity), keep_name=keep_name == "1")


if __name__ == "__main__":
    main()
