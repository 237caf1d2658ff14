"""``hillinferd``: command line, start and stop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from hillinfer_core.errors import ConfigError, HillInferError
from hillinfer_core.layout import PAGE
from hillinfer_core.protocol import attach_socket

from . import __version__, config
from .logs import get_logger, set_up
from .process import RuntimeLock, die_with_parent, make_runtime_dir
from .rpc.server import Transports
from .service.cold_pool import ColdPoolService, Limits
from .service.supervisor import WorkerSettings

log = get_logger(__name__)

app = typer.Typer(add_completion=False)


@app.command(help="Serve the cold pool of long contexts to the applications of this machine.")
def _serve(
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file; its keys are the options below, with underscores"),
    ] = None,
    runtime_dir: Annotated[Path | None, typer.Option(help=config.help_of("runtime_dir"))] = None,
    pool: Annotated[Path | None, typer.Option(help=config.help_of("pool"))] = None,
    pool_capacity: Annotated[str | None, typer.Option(help=config.help_of("pool_capacity"))] = None,
    evaluation_keys_dram: Annotated[
        str | None, typer.Option(help=config.help_of("evaluation_keys_dram"))
    ] = None,
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
            "pool": pool,
            "pool_capacity": pool_capacity,
            "evaluation_keys_dram": evaluation_keys_dram,
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

    limits = Limits(settings.evaluation_keys_dram, settings.arena_limit, settings.session_limit)
    service = ColdPoolService(_worker_settings(settings), limits)
    await service.start()
    try:
        transports = Transports(service, settings.runtime_dir)
        try:
            await transports.start()
            _announce(service, settings)
            await stop.wait()
            log.info("stopping")
        finally:
            await transports.stop()
    finally:
        await service.stop()
    log.info("stopped")


def _worker_settings(settings: config.Config) -> WorkerSettings:
    directory = config.pool_directory(settings.pool)
    if settings.pool is None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"pool: cannot make {directory}: {error.strerror}; name a file with --pool"
            ) from None
    path = settings.pool or directory / f"pool-{os.getpid()}"
    capacity = settings.pool_capacity // PAGE * PAGE
    return WorkerSettings(str(path), capacity, settings.pool is not None, settings.log_level)


def _announce(service: ColdPoolService, settings: config.Config) -> None:
    identity = service.worker.identity
    assert identity is not None
    if not identity.direct_io:
        log.warning(
            "no direct I/O on this file system: the cold pool goes through the page cache", path=identity.path
        )
    log.info(
        "ready",
        version=__version__,
        pid=os.getpid(),
        worker=service.worker.pid,
        socket=attach_socket(settings.runtime_dir),
        pool=identity.path,
        capacity_bytes=identity.capacity,
        direct_io=identity.direct_io,
        evaluation_keys_dram=settings.evaluation_keys_dram,
    )
