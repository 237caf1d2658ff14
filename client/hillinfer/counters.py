"""What a session has had moved and scanned."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Bytes moved and scanned for a session since it connected."""

    written_bytes: int = 0
    """Rows appended to the cold pool."""
    read_bytes: int = 0
    """Read from the cold pool, whole pages where it reads whole pages."""
    evaluated_bytes: int = 0
    """Evaluation keys scanned."""
