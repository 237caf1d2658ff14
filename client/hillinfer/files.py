"""Files that commands write when their work is done."""

from __future__ import annotations

from pathlib import Path

from hillinfer_core.errors import InvalidInput


def check_writable(path: Path | None) -> None:
    """Raise InvalidInput for a file that cannot be written; what it holds stays. For before the work."""
    if path is None:
        return
    there = path.exists()
    try:
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}") from None
