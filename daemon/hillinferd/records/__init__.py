"""What outlives the daemon about durable contexts: a database beside the pool, and its check."""

from __future__ import annotations

import os
from pathlib import Path

from hillinfer_core.errors import ConfigError

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
    if not present(catalogue):
        return None
    aside = _aside(catalogue, _asides(catalogue) + 1)
    for path, to in zip(files_of(catalogue), files_of(aside), strict=True):
        if os.path.exists(path):
            path.rename(to)
    return aside


def last_aside(catalogue: Path) -> Path | None:
    """Return the name that the catalogue last set aside has; None if there is none."""
    number = _asides(catalogue)
    return _aside(catalogue, number) if number else None


def check_can_set_aside(catalogue: Path) -> None:
    """Raise :class:`ConfigError` if this user cannot tell whether there is a catalogue, or rename it."""
    is_there(catalogue)
    may = os.access(catalogue.parent, os.W_OK | os.X_OK, effective_ids=True)
    if present(catalogue) and not may:
        raise ConfigError(
            f"the catalogue {catalogue} cannot be set aside; run this as a user who may rename it"
        )


def is_there(path: Path) -> bool:
    """Return whether ``path`` exists; raises :class:`ConfigError` if this user cannot tell."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigError(f"cannot look at {path}: {error.strerror}; run this as a user who may") from None
    return True


def present(catalogue: Path) -> list[Path]:
    """Return those files of a catalogue that are there."""
    return [path for path in files_of(catalogue) if os.path.exists(path)]


def _asides(catalogue: Path) -> int:
    number = 0
    while present(_aside(catalogue, number + 1)):
        number += 1
    return number


def _aside(catalogue: Path, number: int) -> Path:
    return Path(f"{catalogue}.old{number}")
