"""The worker's main loop: a request in, a reply out, until the daemon hangs up."""

from __future__ import annotations

import os
import socket

from hillinfer_core.errors import DeviceUnavailable, HillInferError

from ..driver.open import open_driver
from ..driver.settings import DriverSettings
from ..logs import get_logger
from . import messages
from .operations import Operations

log = get_logger(__name__)


def serve(sock: socket.socket, settings: DriverSettings) -> None:
    """Open the pool, say :class:`~hillinferd.worker.messages.Ready`, and serve until hang-up."""
    try:
        driver = open_driver(settings)
        driver.health()
    except HillInferError as error:
        sock.send(messages.encode(messages.Failed(type(error).__name__, str(error))))
        return
    except OSError as error:
        failed = messages.Failed(
            DeviceUnavailable.__name__, f"cannot open the cold pool {settings.path}: {error.strerror}"
        )
        sock.send(messages.encode(failed))
        return
    operations = Operations(driver)
    try:
        sock.send(messages.encode(messages.Ready(driver.identify())))
        while True:
            request, fd = messages.receive_request(sock)
            if request is None:
                return
            try:
                reply = operations.carry_out(request, fd)
            finally:
                if fd is not None:
                    os.close(fd)
            sock.send(messages.encode(reply))
    except ConnectionError:
        log.debug("the daemon hung up")
    finally:
        driver.close()
