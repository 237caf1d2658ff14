"""``hillinferd``: the command line."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from hillinfer_core.errors import HillInferError
from hillinfer_core.protocol import attach_socket

from . import __version__, config, systemd
from .logs import set_up
from .process import RuntimeLock, die_with_parent, make_runtime_dir, raise_descriptor_limit
from .reload import Reloader
from .service.express import Express
from .serving import serve

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
    check_config: Annotated[
        bool, typer.Option("--check-config", help="say whether the configuration is accepted, and exit")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if version:
        print(__version__)
        return
    if die_with_parent_ and not check_config:
        die_with_parent(signal.SIGTERM)
    overrides = {
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
    }
    given = config.read(config_file, overrides)
    settings = config.build(given)
    if check_config:
        print("the configuration is accepted")
        return
    set_up(settings.log_level)
    raise_descriptor_limit()
    listening = systemd.listening_socket(attach_socket(settings.runtime_dir))
    make_runtime_dir(settings.runtime_dir)
    lock = RuntimeLock(settings.runtime_dir)
    express = Express()
    with asyncio.Runner(loop_factory=express.new_loop) as runner:
        runner.run(serve(settings, Reloader(config_file, overrides, given), listening, express))
    del lock


def main() -> None:
    """Run ``hillinferd``; an error that says what to do ends it with one line and exit code 1."""
    try:
        app()
    except HillInferError as error:
        print(f"hillinferd: {error}", file=sys.stderr)
        raise SystemExit(1) from None
