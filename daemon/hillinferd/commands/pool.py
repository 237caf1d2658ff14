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
from ..records import catalogue_path, check_can_set_aside, is_there, last_aside, present, set_aside
from ..records.check import PoolReport, check
from ..records.database import Database
from ..records.durable import DurableRecords
from .connection import JsonOption
from .console import wide_console

StateDirOption = Annotated[
    Path | None, typer.Option("--state-dir", help="directory of the catalogue, if the daemon has one")
]


def format_command(
    device: Annotated[Path, typer.Argument(help="block device, for example /dev/nvme1n1p3")],
    force: Annotated[bool, typer.Option("--force", help="lose what is on it")] = False,
    state_dir: StateDirOption = None,
) -> None:
    """Make a block device an empty cold pool; what it held is lost."""
    catalogue = catalogue_path(device, state_dir)
    check_can_set_aside(catalogue)
    try:
        pool_id = format_device(device, force=force)
    except OSError as error:
        raise DeviceUnavailable(f"cannot format {device}: {error.strerror}") from None
    # Not deleted: device names change, and it may be that of another pool.
    try:
        aside = set_aside(catalogue)
    except OSError as error:
        raise DeviceUnavailable(
            f"{device} is an empty cold pool, but its catalogue cannot be set aside: {error.strerror}; "
            f"move {catalogue} away"
        ) from None
    if aside:
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
    try:
        path = catalogue_path(pool, state_dir)
        _require(pool, path, repair)
        # The smallest capacity: what is there is kept, and not grown.
        storage = Storage(pool, PAGE, keep=True)
        try:
            report, outcome = _check(storage, path, repair)
        finally:
            storage.close()
    except OSError as error:
        raise DeviceUnavailable(f"cannot read {error.filename or pool}: {error.strerror}") from None
    if as_json:
        print(json.dumps(_plain(report, outcome), indent=2))
    else:
        _show(report, outcome, wide_console())
    if outcome == "damaged":
        raise typer.Exit(1)


def _require(pool: Path, path: Path, repair: bool) -> None:
    """Raise :class:`ConfigError` unless the pool is there, and its catalogue or what is left of it."""
    if not is_there(pool):
        raise ConfigError(f"there is no {pool}; name the pool of a daemon that keeps durable contexts")
    if is_there(path) or (repair and (present(path) or last_aside(path))):
        return
    raise ConfigError(
        f"there is no {path}, the catalogue of {pool}; bring it back, or name its directory with "
        "--state-dir. To give up what is in the pool, delete it (a device: `hillinferctl format --force`)"
    )


def _check(storage: Storage, path: Path, repair: bool) -> tuple[PoolReport, str]:
    left = [*present(path), *present(last_aside(path) or path)]
    # The daemon's, which may not read what is root's.
    owner = (left[0].stat().st_uid, left[0].stat().st_gid)
    try:
        if path != left[0]:
            raise DamagedCatalogue(f"{path} is missing")
        records = DurableRecords(Database(path, salvage=repair, owner=owner))
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
    aside = set_aside(path) or last_aside(path)
    records = DurableRecords(Database(path, owner=owner))
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
