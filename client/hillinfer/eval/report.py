"""The tables of an evaluation, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from hillinfer.eval.job import Cell, Result
from hillinfer.eval.paired import Difference

T = TypeVar("T")


def as_markdown(result: Result) -> str:
    """Return a table of answers for each length, then what else was measured."""
    lines = [
        f"**{result.model}, {result.dtype}, {result.precision} evaluation keys, seed {result.seed}**",
        "",
    ]
    lines += answer_tables(result.cells)
    if result.differences:
        lines += [*difference_table(result.differences), ""]
    if result.perplexity:
        rows = [
            [
                f"{row['context_tokens']:,}",
                row["policy"],
                row["budget"],
                f"{row['perplexity']:.3f}",
                str(row["tokens"]),
            ]
            for row in result.perplexity
        ]
        lines += [*_table(["context tokens", "policy", "budget", "perplexity", "tokens predicted"], rows), ""]
    for row in result.predicted:
        lines += [
            f"{row['policy']}, {row['budget']}, {row['context_tokens']:,} context tokens: "
            f"{row['share']:.0%} of {row['layer_steps']:,} layer-steps attended a predicted "
            "selection, the others an exact one",
            "",
        ]
    for row in result.mass:
        lines += [*_mass_table(row), ""]
    if result.metrics:
        names = ["recall", "captured_mass", "step_overlap", "query_cosine"]
        rows = [
            [
                f"{row['context_tokens']:,}",
                row["policy"],
                row["budget"],
                str(row["layer"]),
                *(_figure(row[name]) for name in names),
            ]
            for row in result.metrics
        ]
        heads = ["context tokens", "policy", "budget", "layer", *(name.replace("_", " ") for name in names)]
        lines += [*_table(heads, rows), ""]
    return "\n".join(lines).rstrip()


def answer_tables(cells: Sequence[Cell]) -> list[str]:
    """Return a table of answers for each context length, each with an empty line after it."""
    lines = []
    for tokens in _distinct(cell.context_tokens for cell in cells):
        lines += [*_answers([cell for cell in cells if cell.context_tokens == tokens]), ""]
    return lines


def _mass_table(row: dict[str, Any]) -> list[str]:
    tokens = row["context_tokens"]
    rows = [
        [str(layer), f"{attended:,.0f}", f"{attended / tokens:.1%}", f"{whole:.0%}"]
        for layer, (attended, whole) in enumerate(
            zip(row["attended_tokens_by_layer"], row["whole_steps_by_layer"], strict=True)
        )
    ]
    title = (
        f"{row['policy']}, {row['budget']}, {tokens:,} context tokens: {row['kind']} "
        f"{row['least']:.4f} at worst, {row['mean']:.4f} on average"
    )
    return [title, "", *_table(["layer", "attended tokens", "of the context", "steps with all"], rows)]


def difference_table(differences: Sequence[Difference]) -> list[str]:
    """Return a table of differences in points, with their 95 % intervals."""
    rows = [
        [
            each.policy,
            each.budget,
            " and ".join(f"{tokens:,}" for tokens in each.context_tokens),
            f"{each.points:+.1f}",
            f"{each.low:+.1f} to {each.high:+.1f}",
            str(each.prompts),
        ]
        for each in differences
    ]
    baseline = differences[0].baseline
    return _table(
        ["policy", "budget", "context tokens", f"points more than {baseline}", "95 % interval", "prompts"],
        rows,
    )


def pooled(cells: Sequence[Cell]) -> tuple[float, int]:
    """Return the accuracy over all answers of `cells`, and how many there are."""
    answers = sum(cell.prompts for cell in cells)
    return sum(cell.accuracy * cell.prompts for cell in cells) / answers, answers


def _answers(cells: list[Cell]) -> list[str]:
    columns = _distinct((cell.task, cell.turn) for cell in cells)
    several = len({turn for _, turn in columns}) > 1
    heads = [task + (f", question {turn}" if several else "") for task, turn in columns]
    rows = []
    for policy, budget in _distinct((cell.policy, cell.budget) for cell in cells):
        mine = [cell for cell in cells if (cell.policy, cell.budget) == (policy, budget)]
        accuracy, answers = pooled(mine)
        by_column = {(cell.task, cell.turn): f"{cell.accuracy:.0%} of {cell.prompts}" for cell in mine}
        counted = [cell.attended_tokens for cell in mine if cell.attended_tokens is not None]
        attended = f"{np.mean(counted):,.0f}" if counted else "-"
        rows.append(
            [
                policy, budget, attended,
                *(by_column.get(column, "-") for column in columns), f"**{accuracy:.1%}** of {answers}",
            ]
        )  # fmt: skip
    title = f"{cells[0].context_tokens:,} context tokens"
    return [title, "", *_table(["policy", "budget", "attended tokens", *heads, "all answers"], rows)]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _distinct(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))
