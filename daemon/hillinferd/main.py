"""``hillinferd``: command line, start and stop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from hillinfer_core.errors import ConfigError, HillInferError
from hillinfer_core.layout import PAGE
from hillinfer_core.protocol import attach_socket

from . import __version__, config, records
from .driver.block import names_device
from .driver.settings import DriverSettings
from .logs import get_logger, set_up
from .metrics.metrics import Metrics
from .process import RuntimeLock, die_with_parent, make_runtime_dir
from .rpc.server import Transports
from .service.cold_pool import ColdPoolService
from .service.drive import DriveSettings
from .service.hotplug import Hotplug

log = get_logger(__name__)

app = typer.Typer(add_completion=False)


@app.command(help="Serve the cold pool of long contexts to the applications of this machine.")
def _serve(
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file; its keys are the options below, with underscores"),
    ] = None,
    runtime_dir: Annotated[Path | None, typer.Option(help=config.help_of("runtime_dir"))] = None,
    state_dir: Annotated[Path | None, typer.Option(help=config.help_of("state_dir"))] = None,
    driver: Annotated[str | None, typer.Option(help=config.help_of("driver"))] = None,
    pool: Annotated[Path | None, typer.Option(help=config.help_of("pool"))] = None,
    pool_dir: Annotated[Path | None, typer.Option(help=config.help_of("pool_dir"))] = None,
    pool_capacity: Annotated[str | None, typer.Option(help=config.help_of("pool_capacity"))] = None,
    evaluation_keys_dram: Annotated[
        str | None, typer.Option(help=config.help_of("evaluation_keys_dram"))
    ] = None,
    profile: Annotated[str | None, typer.Option(help=config.help_of("profile"))] = None,
    exit_when_idle: Annotated[int | None, typer.Option(help=config.help_of("exit_when_idle"))] = None,
    metrics_file: Annotated[Path | None, typer.Option(help=config.help_of("metrics_file"))] = None,
    log_level: Annotated[str | None, typer.Option(help=config.help_of("log_level"))] = None,
    die_with_parent_: Annotated[
        bool, typer.Option("--die-with-parent", help="end when the process that started this one ends")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if version:
        print(__version__)
        return
    if die_with_parent_:
        die_with_parent(signal.SIGTERM)
    settings = config.load(
        config_file,
        {
            "runtime_dir": runtime_dir,
            "state_dir": state_dir,
            "driver": driver,
            "pool": pool,
            "pool_dir": pool_dir,
            "pool_capacity": pool_capacity,
            "evaluation_keys_dram": evaluation_keys_dram,
            "profile": profile,
            "exit_when_idle": exit_when_idle,
            "metrics_file": metrics_file,
            "log_level": log_level,
        },
    )
    set_up(settings.log_level)
    make_runtime_dir(settings.runtime_dir)
    lock = RuntimeLock(settings.runtime_dir)
    asyncio.run(_run(settings))
    del lock


def main() -> None:
    """Run ``hillinferd``; an error that says what to do ends it with one line and exit code 1."""
    try:
        app()
    except HillInferError as error:
        print(f"hillinferd: {error}", file=sys.stderr)
        raise SystemExit(1) from None


async def _run(settings: config.Config) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    drives = [_drive_settings(drive, settings) for drive in settings.drives]
    service = ColdPoolService(drives, settings.limits, settings.log_level)
    await service.start()
    try:
        transports = Transports(service, settings.runtime_dir)
        metrics = Metrics(service, settings.runtime_dir, settings.metrics_file)
        try:
            await metrics.start()
            await transports.start()
            _announce(service, settings)
            async with _following(service, settings):
                await _until(stop, service, settings.exit_when_idle)
            log.info("stopping")
        finally:
            await transports.stop()
            await metrics.stop()
    finally:
        await service.stop()
    log.info("stopped")


async def _until(stop: asyncio.Event, service: ColdPoolService, idle_s: int) -> None:
    idle_since = time.monotonic()
    while not stop.is_set():
        if any(service.sessions):
            idle_since = time.monotonic()
        elif idle_s and time.monotonic() - idle_since > idle_s:
            log.info("nobody is attached any more", idle_s=idle_s)
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.5 if idle_s else None)


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


def _drive_settings(drive: config.DriveConfig, settings: config.Config) -> DriveSettings:
    path, catalogue = drive.pool, None
    state_dir = settings.state_dir or settings.pool_dir
    if path is None:
        try:
            settings.pool_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"pool_dir: cannot make {settings.pool_dir}: {error.strerror}; name a file with --pool"
            ) from None
        path = settings.pool_dir / f"pool-{os.getpid()}-{drive.name}"
    else:
        catalogue = records.catalogue_path(path, settings.state_dir)
        state_dir = catalogue.parent
    return DriveSettings(
        drive.name,
        DriverSettings(
            drive.driver,
            str(path),
            drive.pool_capacity // PAGE * PAGE,
            drive.pool is not None,
            drive.evaluation_keys_dram,
            drive.profile,
            drive.card,
            str(drive.bitstream or ""),
            str(drive.configurations or ""),
            str(state_dir),
        ),
        catalogue,
        settings.request_timeout,
    )


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
