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
from hillinfer_core.layout import PAGE
from hillinfer_core.units import format_bytes

from ..driver.block import format_device
from ..driver.storage import Storage
from ..records import catalogue_path, set_aside
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
    except OSError as error:
        raise DeviceUnavailable(f"cannot format {device}: {error.strerror}") from None
    # Not deleted: device names change, and it may be that of another pool.
    if aside := set_aside(catalogue_path(device, state_dir)):
        print(f"the catalogue that was there is now {aside}")
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
    if not pool.exists() or not (path.exists() or repair):
        missing = pool if not pool.exists() else path
        raise ConfigError(f"there is no {missing}; name the pool of a daemon that keeps durable contexts")
    try:
        # The smallest capacity: what is there is kept, and not grown.
        storage = Storage(pool, PAGE, keep=True)
        try:
            report, outcome = _check(storage, path, repair)
        finally:
            storage.close()
    except OSError as error:
        raise DeviceUnavailable(f"cannot read {pool}: {error.strerror}") from None
    if as_json:
        print(json.dumps(_plain(report, outcome), indent=2))
    else:
        _show(report, outcome, Console())
    if outcome == "damaged":
        raise typer.Exit(1)


def _check(storage: Storage, path: Path, repair: bool) -> tuple[PoolReport, str]:
    try:
        records = DurableRecords(Database(path, salvage=repair))
        try:
            if records.database.fresh:
                records.database.bind(storage.pool_id)
            report, lost = check(storage, records)
            if repair:
                for durable in lost:
                    records.delete(durable)
            gone = len(lost) + len(records.database.salvaged)
            return report, "clean" if not gone else f"{gone} contexts deleted" if repair else "damaged"
        finally:
            records.database.close()
    except DamagedCatalogue:
        if not repair:
            raise
    # Nothing can be said of any context without its records.
    aside = set_aside(path)
    records = DurableRecords(Database(path))
    records.database.bind(storage.pool_id)
    records.database.close()
    return PoolReport(storage.capacity), f"all contexts given up, the catalogue is now {aside}"


def _plain(report: PoolReport, outcome: str) -> dict[str, object]:
    contexts = [{**asdict(context), "lost": context.lost} for context in report.contexts]
    return {**asdict(report), "contexts": contexts, "clean": outcome == "clean", "outcome": outcome}


def _show(report: PoolReport, outcome: str, console: Console) -> None:
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
    remedy = "; --repair deletes the contexts that are" if outcome == "damaged" else ""
    console.print(f"{used} of {capacity} in use, {outcome}{remedy}")
