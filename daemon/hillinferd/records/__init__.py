"""What outlives the daemon about durable contexts: a database beside the pool, and its check."""

from __future__ import annotations

from pathlib import Path

from ..driver.block import names_device

SYSTEM_STATE_DIR = Path("/var/lib/hillinfer")


def catalogue_path(pool: Path, state_dir: Path | None) -> Path:
    """Return the catalogue file of ``pool``: in ``state_dir``, else beside a file, or the system's."""
    directory = state_dir or (SYSTEM_STATE_DIR if names_device(pool) else pool.parent)
    return directory / f"{pool.name}.catalogue"


def files_of(catalogue: Path) -> list[Path]:
    """Return the files that make up a catalogue, there or not: SQLite's, and the counter beside them."""
    return [catalogue.with_name(catalogue.name + suffix) for suffix in ("", "-wal", "-shm", ".sequence")]


def set_aside(catalogue: Path) -> Path | None:
    """Rename what there is of a catalogue, and return its new name; None if there is nothing."""
    if not any(path.exists() for path in files_of(catalogue)):
        return None
    number, aside = 1, Path(f"{catalogue}.old1")
    while any(path.exists() for path in files_of(aside)):
        number += 1
        aside = Path(f"{catalogue}.old{number}")
    for path, to in zip(files_of(catalogue), files_of(aside), strict=True):
        if path.exists():
            path.rename(to)
    return aside
