"""What fits the costs of a growing decode step: exponents, straight lines; their tables and picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hillinfer_core.errors import InvalidInput

COSTS = ("step_ms", "evaluated_bytes", "read_bytes", "row_reads", "drive_cpu_ms")

STRAIGHT = 0.1
"""Costs that are nowhere further from a straight line, of themselves, are called linear: times vary by as
much. Our choice."""


def read_axes(file: Path) -> list[dict[str, Any]]:
    """Return the axes that a `file` of this benchmark holds. Raises InvalidInput for any other file."""
    try:
        axes = json.loads(file.read_text(encoding="utf-8"))["axes"]
        for each in axes:
            exponents(each["points"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{file} holds no axes of this benchmark: name another file") from error
    return list(axes)


def exponents(points: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return for each cost the exponent b of size ** b that fits it best in logarithms.

    None of no cost, and of a single size.
    """
    found: dict[str, float | None] = {}
    sizes = np.log([point["size"] for point in points])
    for cost in COSTS:
        values = np.array([point[cost] for point in points], float)
        known = (values > 0).all() and len(set(sizes)) > 1
        found[cost] = round(float(np.polyfit(sizes, np.log(values), 1)[0]), 3) if known else None
    return found


def lines(points: Sequence[dict[str, Any]]) -> dict[str, dict[str, float] | None]:
    """Return for each cost the line `fixed` + `each` * size that fits it best; None of no cost, or two sizes.

    By least squares of the relative deviations, of which `off` is the greatest. An exponent above 1 may be
    that of a line that begins below zero: then `off` is small.
    """
    found: dict[str, dict[str, float] | None] = {}
    sizes = np.array([point["size"] for point in points], float)
    for cost in COSTS:
        values = np.array([point[cost] for point in points], float)
        found[cost] = None
        if len(points) > 2 and (values > 0).all():
            terms = np.stack([1 / values, sizes / values], 1)
            fixed, each = np.linalg.lstsq(terms, np.ones(len(values)))[0]
            off = np.abs(terms @ (fixed, each) - 1).max()
            found[cost] = {"fixed": float(fixed), "each": float(each), "off": round(float(off), 3)}
    return found


def faster(points: Sequence[dict[str, Any]]) -> list[str]:
    """Return the costs that grow faster than linearly: exponent above 1, bent up, on no straight line."""
    found, exponent, line = [], exponents(points), lines(points)
    for cost in COSTS:
        fit, power = line[cost], exponent[cost]
        if fit is None or power is None:
            continue
        end = points[-1]
        if power > 1 and fit["off"] > STRAIGHT and end[cost] > fit["fixed"] + fit["each"] * end["size"]:
            found.append(cost)
    return found


def as_markdown(axes: Sequence[dict[str, Any]]) -> str:
    """Return tables of the exponents and of the straight lines, and one of the points of each axis."""
    costs = "step time | keys ranked | bytes read | rows read | drive's CPU |"
    told = [f"| exponents | from, to | {costs}", "|---|---|---|---|---|---|---|"]
    for each in axes:
        sizes = [point["size"] for point in each["points"]]
        cells = ["-" if b is None else f"{b:.2f}" for b in exponents(each["points"]).values()]
        told.append(f"| {each['axis']} | {sizes[0]:,} to {sizes[-1]:,} | {' | '.join(cells)} |")
    told += ["", f"| straight lines: fixed part of the last, off by | {costs}", "|---|---|---|---|---|---|"]
    for each in axes:
        end = each["points"][-1]
        cells = [
            "-" if fit is None else f"{fit['fixed'] / end[cost]:.0%}, {fit['off']:.0%}"
            for cost, fit in lines(each["points"]).items()
        ]
        told.append(f"| {each['axis']} | {' | '.join(cells)} |")
    for each in axes:
        told += [
            "",
            f"| {each['axis']} | step, ms | keys ranked, KiB | read, KiB | rows read | drive's CPU, ms |",
            "|---|---|---|---|---|---|",
        ]
        for point in each["points"]:
            least, most = point["least_ms"], point["greatest_ms"]
            cells = [
                f"{point['size']:,}",
                f"{point['step_ms']:.1f} ({least:.1f} to {most:.1f})",
                f"{point['evaluated_bytes'] / 1024:,.0f}",
                f"{point['read_bytes'] / 1024:,.0f}",
                f"{point['row_reads']:,.0f}",
                f"{point['drive_cpu_ms']:.1f}",
            ]
            told.append(f"| {' | '.join(cells)} |")
    steep = [f"{cost} against {each['axis']}" for each in axes for cost in faster(each["points"])]
    last = f"Faster than linearly (bent up, and over {STRAIGHT:.0%} off a straight line): "
    return "\n".join([*told, "", last + (", ".join(steep) or "nothing") + "."])


def draw(axes: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw each cost over each axis, all as multiples of the first point's, .png or .svg. Needs `plots`.

    Points are what was measured, lines the straight ones of `lines`, which the axes bend.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(axes), 3.4), layout="constrained")
    for panel, each in zip(figure.subplots(1, len(axes), squeeze=False, sharey=True)[0], axes, strict=True):
        sizes = [point["size"] for point in each["points"]]
        panel.set(title=each["axis"], xscale="log", yscale="log", xlabel="size")
        panel.set_xscale("log", base=2)
        panel.plot(sizes, [size / sizes[0] for size in sizes], color="grey", linestyle="--", label="linear")
        along = np.geomspace(sizes[0], sizes[-1], 20)
        for number, (cost, fit) in enumerate(lines(each["points"]).items()):
            first, colour = each["points"][0][cost], f"C{number}"
            if first > 0:
                values = [point[cost] / first for point in each["points"]]
                panel.plot(sizes, values, "o", markersize=3, color=colour, label=cost)
            if fit is not None:
                panel.plot(along, (fit["fixed"] + fit["each"] * along) / first, linewidth=1, color=colour)
    figure.axes[0].set_ylabel("times that of the first size")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path)
