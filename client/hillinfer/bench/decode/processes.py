"""What processes took of the CPU, from /proc (proc(5): stat, in clock ticks)."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """Return the processes that `pid` started and that are there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            if int(_fields(path)[1]) == pid:
                found.append(int(path.parent.name))
    return found


def cpu_s(pid: int) -> float:
    """Return the seconds of CPU that `pid` took so far, all threads; 0 once it is gone."""
    try:
        fields = _fields(Path(f"/proc/{pid}/stat"))
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def _fields(path: Path) -> list[str]:
    # After the name, which is in brackets and may hold anything: state, parent, and so on.
    return path.read_text().rpartition(")")[2].split()
