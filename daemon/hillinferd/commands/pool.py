"""``hillinferctl format`` and ``hillinferctl fsck``: a pool that no daemon has open."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hillinfer_core.errors import ConfigError, DamagedCatalogue, DeviceUnavailable
from hillinfer_core.units import format_bytes

from ..driver.block import format_device
from ..driver.storage import Storage
from ..records import catalogue_path
from ..records.check import PoolReport, check
from ..records.database import Database
from ..records.durable import DurableRecords
from .connection import JsonOption

StateDirOption = Annotated[
    Path | None, typer.Option("--state-dir", help="directory of the catalogue, if the daemon has one")
]


def format_command(
    device: Annotated[Path, typer.Argument(help="block device, for example /dev/nvme1n1p3")],
    force: Annotated[bool, typer.Option("--force", help="lose what is on it")] = False,
    state_dir: StateDirOption = None,
) -> None:
    """Make a block device an empty cold pool; what it held is lost."""
    try:
        pool_id = format_device(device, force=force)
        for path in _catalogue_files(catalogue_path(device, state_dir)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise DeviceUnavailable(f"cannot format {device}: {error.strerror}") from None
    print(f"{device} is an empty cold pool ({pool_id}); give it to hillinferd with --pool {device}")


def fsck(
    pool: Annotated[Path, typer.Argument(help="file or block device of the cold pool")],
    state_dir: StateDirOption = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="delete what is damaged, so that the daemon starts again")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every row and key of the durable contexts in a pool; no daemon may have it open."""
    path = catalogue_path(pool, state_dir)
    for needed in (pool, path):
        if not needed.exists():
            raise ConfigError(f"there is no {needed}; name the pool of a daemon that keeps durable contexts")
    try:
        storage = Storage(pool, 0, keep=True)
        try:
            report, repaired = _check(storage, path, repair)
        finally:
            storage.close()
    except OSError as error:
        raise DeviceUnavailable(f"cannot read {pool}: {error.strerror}") from None
    if as_json:
        print(json.dumps(_plain(report, repaired), indent=2))
    else:
        _show(report, repaired, Console())
    if not report.clean and not repaired:
        raise typer.Exit(1)


def _check(storage: Storage, path: Path, repair: bool) -> tuple[PoolReport, bool]:
    try:
        records = DurableRecords(Database(path, forgive_lost_commits=repair))
        try:
            report, lost = check(storage, records)
            if repair:
                for durable in lost:
                    records.delete(durable)
            return report, repair
        finally:
            records.database.close()
    except DamagedCatalogue:
        if not repair:
            raise
    # Nothing can be said of any context without its records.
    for file in _catalogue_files(path):
        if file.exists():
            file.rename(file.with_name(file.name + ".damaged"))
    records = DurableRecords(Database(path))
    records.database.bind(storage.pool_id)
    records.database.close()
    return PoolReport(storage.capacity), True


def _catalogue_files(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm", ".sequence")]


def _plain(report: PoolReport, repaired: bool) -> dict[str, object]:
    contexts = [{**asdict(context), "lost": context.lost} for context in report.contexts]
    return {**asdict(report), "contexts": contexts, "clean": report.clean, "repaired": repaired}


def _show(report: PoolReport, repaired: bool, console: Console) -> None:
    table = Table("context", "uid", "state", "tokens", "rows", "damaged rows", "damaged keys", "problem")
    for context in report.contexts:
        table.add_row(
            context.name,
            str(context.uid),
            "saved" if context.saved else "not saved",
            f"{context.tokens:,}",
            f"{context.rows:,}",
            str(context.damaged_rows),
            str(context.damaged_keys),
            context.problem,
        )
    console.print(table if report.contexts else "no durable contexts")
    used, capacity = format_bytes(report.used_bytes), format_bytes(report.capacity_bytes)
    verdict = "clean" if report.clean else "damage was removed" if repaired else "damaged: see --repair"
    console.print(f"{used} of {capacity} in use, {verdict}")
