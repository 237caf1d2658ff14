"""The picture of `hillinfer bench decode`. Needs the extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hillinfer.bench.decode.report import CELL
from hillinfer.bench.decode.systems import ATTENDED

_WIDTH = 0.8  # of a cell's bars together


def draw(told: dict[str, Any], path: Path) -> None:
    """Write bars of what `report.as_object` returns: rates with the rounds' range, and bytes held."""
    from matplotlib.figure import Figure

    rows = [row for row in told["rows"] if row["system"] != ATTENDED]
    cells = list(dict.fromkeys(tuple(row[name] for name in CELL) for row in rows))
    names = list(dict.fromkeys(_name(row) for row in rows))
    figure = Figure(figsize=(3 + 1.1 * len(cells), 5), layout="constrained")
    rates, held = figure.subplots(2, 1, sharex=True)
    for number, name in enumerate(names):
        mine = [row for row in rows if _name(row) == name]
        places = [
            cells.index(tuple(row[part] for part in CELL)) + (number + 0.5) * _WIDTH / len(names) - _WIDTH / 2
            for row in mine
        ]
        spread = [row["tokens_per_s"] for row in mine]
        ranges = [
            [each["median"] - each["least"] for each in spread],
            [each["greatest"] - each["median"] for each in spread],
        ]
        width = _WIDTH / len(names)
        rates.bar(places, [each["median"] for each in spread], width, yerr=ranges, ecolor="0.4", label=name)
        held.bar(places, [row["resident_bytes"] / (1 << 20) for row in mine], width)
    rates.set(ylabel="tokens/s")
    held.set(ylabel="KV in memory, MiB", yscale="log")
    held.set_xticks(range(len(cells)), [_label(dict(zip(CELL, cell, strict=True))) for cell in cells])
    rates.legend()
    figure.savefig(path)


def _name(row: dict[str, Any]) -> str:
    budget = f" {row['budget']}" if row["budget"] else ""
    return f"{row['system']}{budget}, {row['dtype']}"


def _label(cell: dict[str, Any]) -> str:
    return f"{cell['context_tokens'] / 1024:.3g}K x {cell['batch']}\n{cell['kv']}"
