"""Entry point of the device worker process; started by the daemon only.

Arguments: descriptor of the socket to the daemon, the driver's settings as JSON, log level.
"""

from __future__ import annotations

import signal
import socket
import sys

from ..driver.settings import DriverSettings
from ..logs import set_up
from ..process import die_with_parent, sleep_precisely
from .loop import serve


def main() -> None:
    """Serve the daemon until it hangs up."""
    descriptor, given, level = sys.argv[1:]
    settings = DriverSettings.from_json(given)
    set_up(level)
    # Nothing less ends a worker that hangs; it has nothing to tidy up.
    die_with_parent(signal.SIGKILL)
    # The daemon decides when the worker stops, by hanging up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if settings.profile != "none":
        sleep_precisely()
    with socket.socket(fileno=int(descriptor)) as sock:
        serve(sock, settings)


if __name__ == "__main__":
    main()
