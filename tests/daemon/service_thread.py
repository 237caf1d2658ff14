"""The daemon's service and sockets in a thread of the test, which can so speak with its insides."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hillinferd.driver.settings import DriverSettings
from hillinferd.rpc.server import Transports
from hillinferd.service.cold_pool import ColdPoolService
from hillinferd.service.drive import DriveSettings
from hillinferd.service.express import Express
from hillinferd.service.limits import Limits

T = TypeVar("T")


@dataclass
class Served:
    """A service that serves; its own methods are called through :meth:`run`."""

    service: ColdPoolService
    loop: asyncio.AbstractEventLoop

    def run(self, call: Callable[[], T]) -> T:
        async def work() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(work(), self.loop).result(20)


def drive_settings(name: str, pool: Path, request_timeout_s: float = 20.0) -> DriveSettings:
    driver = DriverSettings("host", str(pool), 64 << 20, keep=True, key_memory=64 << 20)
    return DriveSettings(name, driver, pool.with_name(f"{pool.name}.catalogue"), request_timeout_s)


@contextmanager
def served(runtime_dir: Path, *drives: DriveSettings) -> Iterator[Served]:
    """Serve ``drives`` at the sockets in ``runtime_dir``."""
    express = Express()
    service = ColdPoolService(drives, Limits(session_limit=16), "info", express)
    ready, stop = threading.Event(), asyncio.Event()
    loop = express.new_loop()
    failed: list[BaseException] = []

    async def serve() -> None:
        try:
            await service.start()
            transports = Transports(service, runtime_dir)
            await transports.start()
            ready.set()
            await stop.wait()
            await transports.stop()
            await service.stop()
        except BaseException as error:
            failed.append(error)
            raise
        finally:
            ready.set()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(60)
        if failed:
            raise failed[0]
        yield Served(service, loop)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        loop.close()
