"""The worker's main loop: a request in, a reply out, until the daemon hangs up."""

from __future__ import annotations

import os
import socket

from hillinfer_core.errors import DeviceUnavailable, HillInferError, name_of

from ..cec.configurable import Configurable
from ..driver.open import open_driver
from ..driver.settings import DriverSettings
from ..logs import get_logger
from . import messages, packets
from .configuration import Configuration
from .operations import Operations
from .repeats import Repeats

log = get_logger(__name__)


def serve(sock: socket.socket, settings: DriverSettings) -> None:
    """Open the drive, prove the card's bitstream if it has one, then serve the daemon until it hangs up.

    The first packet is :class:`~hillinferd.worker.messages.Ready`, or ``Failed`` if the drive is not open.
    """
    try:
        driver = open_driver(settings)
        configuration = Configuration(driver, settings) if isinstance(driver, Configurable) else None
        if configuration is not None:
            configuration.restore()
        driver.health()
    except HillInferError as error:
        packets.send_reply(sock, messages.Failed(name_of(error), str(error)))
        return
    except OSError as error:
        failed = messages.Failed(
            DeviceUnavailable.__name__, f"cannot open the cold pool {settings.path}: {error.strerror}"
        )
        packets.send_reply(sock, failed)
        return
    repeats = Repeats(driver)
    operations = Operations(driver, configuration, repeats)
    try:
        packets.send_reply(sock, messages.Ready(driver.identify()))
        received = packets.Packets(sock)
        while True:
            packet, fd = repeats.next(sock)
            if not packet:
                return
            try:
                reply = operations.carry_out(received.request(packet), fd)
            finally:
                if fd is not None:
                    os.close(fd)
            packets.send_reply(sock, reply)
    except ConnectionError:
        log.debug("the daemon hung up")
    finally:
        driver.close()
