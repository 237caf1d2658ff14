"""What outlives the daemon about durable contexts: a database beside the pool, and its check."""

from __future__ import annotations

from pathlib import Path

from ..driver.block import names_device

SYSTEM_STATE_DIR = Path("/var/lib/hillinfer")


def catalogue_path(pool: Path, state_dir: Path | None) -> Path:
    """Return the catalogue file of ``pool``: in ``state_dir``, else beside a file, or the system's."""
    directory = state_dir or (SYSTEM_STATE_DIR if names_device(pool) else pool.parent)
    return directory / f"{pool.name}.catalogue"
