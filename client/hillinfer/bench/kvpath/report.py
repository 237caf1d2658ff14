"""What `hillinfer bench kvpath` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hillinfer.bench.kvpath.measure import Row
from hillinfer.bench.kvpath.workload import Workload
from hillinfer_core.layout import Precision
from hillinfer_core.units import format_bytes


def as_object(
    rows: Sequence[Row], shape: str, workload: Workload, profile: str, precision: Precision
) -> dict[str, Any]:
    """Return what `--json` prints."""
    told = {
        "shape": shape,
        "context_tokens": workload.tokens,
        "profile": profile,
        "key_precision": precision.value,
    }
    return {"rows": [asdict(row) | told for row in rows]}


def as_markdown(told: dict[str, Any]) -> str:
    """Return the table; how many times longer than the first system each takes."""
    rows = told["rows"]
    first = rows[0]
    lines = [
        f"**{first['shape']} layers, {first['context_tokens']:,} tokens, drive paced to {first['profile']}, "
        f"{first['key_precision']} evaluation keys**",
        "",
        f"| system | budget | KV path, ms | spread | p99 | times {first['system']} | of the drive, ms "
        "| misses | moved | requests | resident |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        missed = "-" if row["miss_rate"] is None else f"{row['miss_rate']:.1%}"
        low, high = row["spread_ms"]
        lines.append(
            f"| {row['system']} | {row['budget']} | {row['kvpath_ms']:.2f} | {low:.2f} to {high:.2f} "
            f"| {row['p99_ms']:.2f} | {row['kvpath_ms'] / first['kvpath_ms']:.2f} | {row['drive_ms']:.2f} "
            f"| {missed} "
            f"| {format_bytes(row['moved_bytes'])} | {row['ios']:,} | {format_bytes(row['resident_bytes'])} |"
        )
    return "\n".join(lines)
