"""The picture of `hillinfer bench kvpath`. Needs the extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(told: dict[str, Any], path: Path) -> None:
    """Write bars of what `report.as_object` returns: measured, the rounds' range, and the drive's part."""
    from matplotlib.figure import Figure

    rows = told["rows"]
    figure = Figure(figsize=(7.5, 0.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['system']} at {row['budget']}" for row in rows]
    measured = [row["kvpath_ms"] for row in rows]
    ranges = [
        [max(0.0, row["kvpath_ms"] - row["spread_ms"][0]) for row in rows],
        [max(0.0, row["spread_ms"][1] - row["kvpath_ms"]) for row in rows],
    ]
    axes.barh(names, measured, xerr=ranges, height=0.7, color="C0", ecolor="0.4", label="measured here")
    drive = [row["drive_ms"] for row in rows]
    axes.barh(names, drive, height=0.35, color="C1", label="of it, a SmartSSD's")
    axes.invert_yaxis()
    axes.set(xlabel="from query to staged KV of a layer, ms", xscale="log")
    axes.legend(loc="lower right")
    figure.savefig(path)
