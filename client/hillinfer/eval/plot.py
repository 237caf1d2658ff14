"""The picture of an evaluation. Needs the extra `plots`."""

from __future__ import annotations

from pathlib import Path

from hillinfer.eval.job import Cell, Result
from hillinfer.eval.report import pooled
from hillinfer.files import check_writable
from hillinfer_core.errors import InvalidInput
from hillinfer_core.units import parse_budget


def check_file(path: Path) -> None:
    """Raise InvalidInput for a file that cannot be drawn, ModuleNotFoundError without matplotlib."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise InvalidInput(f"cannot draw {path}: name a .png or .svg file")
    if not path.parent.is_dir():
        raise InvalidInput(f"cannot draw {path}: {path.parent} is not a directory")
    check_writable(path)
    import matplotlib  # noqa: F401


def draw(result: Result, path: Path) -> None:
    """Write a panel for each context length: accuracy over budgets, and over questions in turn, by policy."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    lengths = list(dict.fromkeys(cell.context_tokens for cell in result.cells))
    policies = list(dict.fromkeys(cell.policy for cell in result.cells if cell.policy != "full"))
    colours = {"full": "black"} | {policy: f"C{number}" for number, policy in enumerate(policies)}
    turns = sorted({cell.turn for cell in result.cells})
    figure = Figure(figsize=(5.5 * len(lengths), 4.2 * (1 + (len(turns) > 1))), layout="constrained")
    panels = figure.subplots(1 + (len(turns) > 1), len(lengths), squeeze=False, sharey=True)
    for column, tokens in enumerate(lengths):
        cells = [cell for cell in result.cells if cell.context_tokens == tokens]
        top = panels[0][column]
        top.set(title=f"{tokens:,} context tokens", xlabel="attended tokens in each step", ylim=(-0.03, 1.03))
        for policy in dict.fromkeys(cell.policy for cell in cells):
            # A share of the attention is another number of tokens in each step: not on this axis.
            mine = [cell for cell in cells if cell.policy == policy and not cell.budget.startswith("mass")]
            budgets = sorted({parse_budget(cell.budget).of(tokens) for cell in mine})
            points = [
                pooled([cell for cell in mine if parse_budget(cell.budget).of(tokens) == each])[0]
                for each in budgets
            ]
            if policy == "full":
                top.axhline(points[0], color=colours[policy], linestyle="--", label="full")
            else:
                top.plot(budgets, points, marker="o", color=colours[policy], label=policy)
            if len(turns) > 1:
                panels[1][column].plot(
                    turns, [_at(mine, turn) for turn in turns], marker="o", color=colours[policy]
                )
        top.set_xscale("log", base=2)
        top.set_xticks(
            sorted(
                {
                    parse_budget(cell.budget).of(tokens)
                    for cell in cells
                    if cell.policy != "full" and not cell.budget.startswith("mass")
                }
            )
        )
        top.xaxis.set_major_formatter(ScalarFormatter())
        top.xaxis.set_minor_locator(NullLocator())
        if len(turns) > 1:
            panels[1][column].set(xlabel="question in turn", xticks=turns)
    for row in panels:
        row[0].set_ylabel("right answers")
    panels[0][-1].legend(fontsize="small")
    if result.model:
        figure.suptitle(f"{result.model}, {result.precision} evaluation keys")
    figure.savefig(path, dpi=150)


def _at(cells: list[Cell], turn: int) -> float:
    asked = [cell for cell in cells if cell.turn == turn]
    return pooled(asked)[0] if asked else float("nan")
