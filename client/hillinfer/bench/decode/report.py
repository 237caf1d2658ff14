"""Rows kept in a file, so that a run can be cut off and gone on with; their ratios and their table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hillinfer.bench.decode.systems import ATTENDED, DEFAULT, HILLINFER
from hillinfer.pipeline.timeline import PLACE, PREDICT
from hillinfer_core.errors import InvalidInput
from hillinfer_core.units import format_bytes

Row = dict[str, Any]

_KV = {
    "read": "the text read",
    "made up": "made-up KV, no text read",
    "recorded": "made-up KV, ranked by recorded keys and queries",
}
CELL = ("model", "device", "profile", "context_tokens", "kv", "batch")
"""What rows have in common that are compared."""


class Rows:
    """All rows, in `file` too if there is one; of the same cell, system, dtype and budget the latest."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.rows: list[Row] = []
        if file is not None and file.exists():
            try:
                self.rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InvalidInput(f"{file} holds no rows of this benchmark: name another file") from error

    def put(self, rows: Sequence[Row]) -> None:
        """Add rows, or put them in the place of the same ones of before."""
        new = {_identity(row) for row in rows}
        self.rows = [row for row in self.rows if _identity(row) not in new] + list(rows)
        if self._file is not None:
            try:
                self._file.write_text(json.dumps(as_object(self.rows), indent=1), encoding="utf-8")
            except OSError as error:
                raise InvalidInput(f"cannot write {self._file}: {error.strerror}") from error


def as_object(rows: Sequence[Row]) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {"rows": list(rows), "ratios": ratios(rows)}


def ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return for each of HillInfer's rows how it compares with the others of its cell.

    rate_of_default: its tokens/s to those of the default cache, of the faster dtype; prefill_of_default:
    its prefill to the quicker one's; question_of_ttft: the next question's first token to the first one's,
    before which the text is read. overhead_share: of a mean step, the CPU time of the client beyond the
    model's own (with the attended tokens in a plain cache) and that of the daemon; the process that stands
    for the drive is not counted. beyond_work_share: the same without what is arithmetic or moves rows, the
    spans `predict` and `place` (by the clock, one thread). None where there is nothing to compare with.
    """
    found = []
    for mine in (row for row in rows if row["system"] == HILLINFER):
        cell = [row for row in rows if all(row[name] == mine[name] for name in CELL)]
        default = [row for row in cell if row["system"] == DEFAULT]
        offloaded = [row for row in cell if row["system"] == "offloaded"]
        same = {"system": ATTENDED, "dtype": mine["dtype"], "budget": mine["budget"]}
        bare = next((row for row in cell if all(row[name] == same[name] for name in same)), None)
        rate, question, prefill = (
            _median(mine, "tokens_per_s"),
            _median(mine, "question_s"),
            _median(mine, "prefill_s"),
        )
        overhead, work_ms = None, 0.0
        # CPU time is a mean; the steps after a question, which bring more rows, are long and count in both.
        mean_ms = None if rate is None else 1e3 * mine["batch"] / rate
        if bare is not None:
            cpu = mine["cpu_ms_per_step"]
            work_ms = sum(mine["parts_ms"].get(name, 0.0) for name in (PREDICT, PLACE))
            overhead = {
                "client_ms": round(cpu["client"] - bare["cpu_ms_per_step"]["client"], 3),
                "daemon_ms": cpu["daemon"],
            }
        found.append(
            {name: mine[name] for name in (*CELL, "dtype", "budget")}
            | {
                "rate_of_default": _over(rate, max(_medians(default, "tokens_per_s"), default=None)),
                "rate_of_offloaded": _over(rate, max(_medians(offloaded, "tokens_per_s"), default=None)),
                "prefill_of_default": _over(prefill, min(_medians(default, "prefill_s"), default=None)),
                "question_of_ttft": None
                if question is None or prefill is None
                else _over(question, prefill + question),
                "resident_share": _over(mine["resident_bytes"], mine["full_bytes"]),
                "resident_without_keys_share": _over(mine["resident_without_keys_bytes"], mine["full_bytes"]),
                "overhead": overhead,
                "overhead_share": None if overhead is None else _over(sum(overhead.values()), mean_ms),
                "beyond_work_share": None
                if overhead is None
                else _over(sum(overhead.values()) - work_ms, mean_ms),
            }
        )
    return found


def as_markdown(told: dict[str, Any]) -> str:
    """Return a table for each cell, and the ratios."""
    rows: list[Row] = told["rows"]
    cells = list(dict.fromkeys(tuple(row[name] for name in CELL) for row in rows))
    parts = []
    for cell in cells:
        mine = [row for row in rows if tuple(row[name] for name in CELL) == cell]
        parts.append(_table(dict(zip(CELL, cell, strict=True)), mine))
        parts += [_compared(each) for each in told["ratios"] if tuple(each[name] for name in CELL) == cell]
        parts += [_paced(mine)] if any(row.get("pace") for row in mine) else []
    return "\n\n".join(parts)


def _table(cell: dict[str, Any], rows: Sequence[Row]) -> str:
    drive = "" if cell["profile"] is None else f", drive paced to {cell['profile']}"
    kv = _KV[cell["kv"]]
    lines = [
        f"**{cell['model']} on {cell['device']}, {cell['context_tokens']:,} tokens, batch {cell['batch']}"
        f"{drive}; {kv}**",
        "",
        "| | tokens/s | step p50, p99, ms | prefill, s | next question, s | held | of the KV "
        "| written, read a step | misses |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        moved = "-"
        if row["system"] == HILLINFER:
            moved = (
                f"{format_bytes(row['written_bytes_per_step'])}, {format_bytes(row['read_bytes_per_step'])}"
            )
        budget = f" {row['budget']}" if row["budget"] else ""
        held = "-" if row["system"] == ATTENDED else format_bytes(row["resident_bytes"])
        share = "-" if row["system"] == ATTENDED else f"{row['resident_bytes'] / row['full_bytes']:.1%}"
        missed = "-" if row["miss_rate"] is None else f"{row['miss_rate']:.1%}"
        lines.append(
            f"| {row['system']}{budget}, {row['dtype']} | {_told(row['tokens_per_s'], '.1f')} "
            f"| {row['step_p50_ms']:.1f}, {row['step_p99_ms']:.1f} | {_told(row['prefill_s'], '.1f')} "
            f"| {_told(row['question_s'], '.3f')} | {held} | {share} | {moved} | {missed} |"
        )
    return "\n".join(lines)


def _compared(each: dict[str, Any]) -> str:
    phrases = [
        form.format(each[name])
        for name, form in (
            ("rate_of_default", "{:.2f} times the rate of the default cache"),
            ("rate_of_offloaded", "{:.2f} times that of the offloaded"),
            ("prefill_of_default", "prefill {:.2f} of plain"),
            ("question_of_ttft", "next question {:.1%} of the first one's time"),
            ("resident_without_keys_share", "held {:.1%} of the KV"),
            ("resident_share", "{:.1%} with evaluation keys"),
            ("overhead_share", "overhead {:.0%} of a step"),
            ("beyond_work_share", "{:.0%} without predicting queries and placing rows"),
        )
        if each[name] is not None
    ]
    if each["overhead"] is not None:
        client, daemon = each["overhead"]["client_ms"], each["overhead"]["daemon_ms"]
        phrases.append(
            f"in CPU time {client:.1f} ms of the client beyond the model's, {daemon:.1f} ms of the daemon"
        )
    return f"HillInfer, {each['budget']}: {', '.join(phrases)}."


def _paced(rows: Sequence[Row]) -> str:
    phrases = [
        f"{row['system']} {pace['wanted_ms']:.1f} ms, took {pace['took_ms']:.1f} "
        f"({pace['late_share']:.1%} of layers late)"
        for row in rows
        if (pace := row.get("pace"))
    ]
    return f"Compute of a step, as the GPU would take for it: {'; '.join(phrases)}."


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in (*CELL, "system", "dtype", "budget"))


def _median(row: Row, name: str) -> float | None:
    return None if row[name] is None else float(row[name]["median"])


def _medians(rows: Sequence[Row], name: str) -> list[float]:
    return [found for row in rows if (found := _median(row, name)) is not None]


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else round(a / b, 4)


def _told(spread: dict[str, float] | None, form: str) -> str:
    if spread is None:
        return "-"
    if spread["of"] == 1:
        return format(spread["median"], form)
    return f"{spread['median']:{form}} ({spread['least']:{form}} to {spread['greatest']:{form}})"
