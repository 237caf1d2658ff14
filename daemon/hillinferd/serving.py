"""Start, reload and stop of the daemon, and what it tells systemd meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from hillinfer_core.errors import ConfigError
from hillinfer_core.protocol import attach_socket

from . import __version__, config, systemd
from .driver.block import names_device
from .drives import drive_settings
from .logs import get_logger, set_level
from .metrics.metrics import Metrics
from .reload import Reloader
from .rpc.server import Transports
from .service.cold_pool import ColdPoolService
from .service.express import Express
from .service.hotplug import Hotplug
from .service.progress import Progress

log = get_logger(__name__)

STATUS_S = 5.0
"""Seconds between two lines for ``systemctl status`` where no watchdog asks for more. Our choice."""

_FEEDS = 3  # as many times within the watchdog's time, so that a slow one does not count


async def serve(
    settings: config.Config, reloader: Reloader, listening: socket.socket | None, express: Express
) -> None:
    """Serve until SIGTERM, SIGINT, or nobody having been attached for ``exit_when_idle``; SIGHUP reloads.

    ``listening`` is the attach socket if systemd has it, ``express`` the loop's selector. Raises what keeps
    all drives from serving.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    drives = [drive_settings(drive, settings) for drive in settings.drives]
    service = ColdPoolService(drives, settings.limits, settings.log_level, express)
    await service.start()
    try:
        transports = Transports(service, settings.runtime_dir, listening)
        metrics = Metrics(service, settings.runtime_dir, settings.metrics_file)
        try:
            await metrics.start()
            await transports.start()
            _announce(service, settings)
            async with _following(service, settings):
                await _Run(service, settings, reloader, stop, metrics.fed).until_stopped()
            log.info("stopping")
            systemd.notify("STOPPING=1", "STATUS=Requests in flight finish")
        finally:
            await transports.stop()
            await metrics.stop()
    finally:
        await service.stop()
    log.info("stopped")


class _Run:
    """The time between ready and stop."""

    def __init__(
        self,
        service: ColdPoolService,
        settings: config.Config,
        reloader: Reloader,
        stop: asyncio.Event,
        fed: Callable[[float], None],
    ) -> None:
        self._service = service
        self._idle_s = settings.exit_when_idle
        self._reloader = reloader
        self._stop = stop
        self._fed = fed

    async def until_stopped(self) -> None:
        if self._reloader.file is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)
        reports = asyncio.create_task(self._report())
        try:
            await self._wait()
        finally:
            reports.cancel()
            await asyncio.gather(reports, return_exceptions=True)

    async def _wait(self) -> None:
        idle_since = time.monotonic()
        while not self._stop.is_set():
            if any(self._service.sessions):
                idle_since = time.monotonic()
            elif self._idle_s and time.monotonic() - idle_since > self._idle_s:
                log.info("nobody is attached any more", idle_s=self._idle_s)
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), 0.5 if self._idle_s else STATUS_S)

    def _reload(self) -> None:
        systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            change = self._reloader.reload()
        except ConfigError as error:
            log.error("configuration not reloaded", reason=error)
        else:
            set_level(change.settings.log_level)
            self._service.set_log_level(change.settings.log_level)
            self._service.apply_limits(change.settings.limits)
            self._idle_s = change.settings.exit_when_idle
            restart = ", ".join(change.restart)
            log.info("configuration reloaded", applied=", ".join(change.applied) or "nothing")
            if restart:
                log.warning("these keys need a restart of the daemon to apply", keys=restart)
        finally:
            systemd.notify("READY=1")

    async def _report(self) -> None:
        """Feed the watchdog while supervision and the drives' work move, and say how things are."""
        progress = Progress(self._service.drives)
        limit_s = systemd.watchdog_s()
        said, fed_at = "", time.monotonic()
        systemd.notify("READY=1")
        while True:
            stalled = progress.stalled()
            if stalled and stalled != said:
                log.error("the watchdog is not fed", reason=stalled)
            said = stalled
            systemd.notify(f"STATUS={stalled or self._status()}", *([] if stalled else ["WATCHDOG=1"]))
            if limit_s and not stalled:
                now = time.monotonic()
                self._fed(limit_s - (now - fed_at))
                fed_at = now
            await asyncio.sleep(limit_s / _FEEDS if limit_s else STATUS_S)

    def _status(self) -> str:
        drives = self._service.drives
        up, sessions = sum(drive.worker.up for drive in drives), sum(1 for _ in self._service.sessions)
        return f"{up} of {len(drives)} drives serve {sessions} sessions"


@asynccontextmanager
async def _following(service: ColdPoolService, settings: config.Config) -> AsyncIterator[None]:
    """Follow what comes and goes, if that can concern a drive: one with a file only is never affected."""
    if not any(drive.card or (drive.pool and names_device(drive.pool)) for drive in settings.drives):
        yield
        return
    task = asyncio.create_task(Hotplug(service.drives).follow())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _announce(service: ColdPoolService, settings: config.Config) -> None:
    for drive in service.drives:
        identity = drive.worker.identity
        if identity is None:
            log.error("drive is gone; it is tried again", name=drive.name, reason=drive.worker.reason)
            continue
        if not identity.direct_io:
            log.warning(
                "no direct I/O on this file system: the cold pool goes through the page cache",
                path=identity.path,
            )
        log.info(
            "drive",
            name=drive.name,
            driver=identity.driver,
            worker=drive.worker.pid,
            pool=identity.path,
            capacity_bytes=identity.capacity,
            direct_io=identity.direct_io,
            evaluation_keys_bytes=identity.key_memory,
            profile=identity.profile,
            durable_contexts=len(drive.catalogue.durables),
        )
    log.info("ready", version=__version__, pid=os.getpid(), socket=attach_socket(settings.runtime_dir))
