"""What evaluating prompts found, and what the findings come to together."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from hillinfer.eval.job import Cell, Result
from hillinfer.eval.metrics import Ranked, Sums
from hillinfer.eval.paired import differences
from hillinfer.files import check_writable
from hillinfer.report import MassReport
from hillinfer_core.errors import InvalidInput

Run = tuple[str, int, str]
"""Policy, context tokens, budget."""


@dataclass(frozen=True)
class Answer:
    """One answer; prompt: the number of its context among those of its length.

    text: fingerprint of context and questions, which come from the interpreter's own sources: another
    interpreter, like another seed, has other texts under the same number.
    """

    policy: str
    task: str
    context_tokens: int
    budget: str
    turn: int
    prompt: int
    score: float
    attended_tokens: float | None
    text: str = ""


@dataclass
class Findings:
    """Of one prompt."""

    answers: list[Answer] = field(default_factory=list)
    metrics: dict[Run, dict[int, Sums]] = field(default_factory=dict)
    losses: dict[Run, list[float]] = field(default_factory=dict)
    mass: dict[Run, list[MassReport]] = field(default_factory=dict)
    ranked: dict[Run, Ranked] = field(default_factory=dict)


def collect(result: Result, found: Sequence[Findings]) -> None:
    """Put what was found, in the order of the prompts, into the result."""
    answers = [answer for each in found for answer in each.answers]
    result.cells += cells(answers)
    result.differences += differences(answers)
    metrics: dict[Run, dict[int, Sums]] = {}
    losses: dict[Run, list[float]] = defaultdict(list)
    for each in found:
        for run, layers in each.metrics.items():
            for layer, sums in layers.items():
                metrics.setdefault(run, {}).setdefault(layer, Sums()).add(sums)
        for run, more in each.losses.items():
            losses[run] += more
    _collect_mass(result, found)
    _collect_predicted(result, found)
    for (policy, tokens, budget), layers in metrics.items():
        told = {"policy": policy, "context_tokens": tokens, "budget": budget}
        result.metrics += [told | {"layer": layer} | layers[layer].means() for layer in sorted(layers)]
    for (policy, tokens, budget), each_loss in losses.items():
        told = {"policy": policy, "context_tokens": tokens, "budget": budget}
        perplexity = math.exp(float(np.mean(each_loss)))
        result.perplexity.append(told | {"perplexity": round(perplexity, 4), "tokens": len(each_loss)})


def _collect_predicted(result: Result, found: Sequence[Findings]) -> None:
    for run in dict.fromkeys(run for each in found for run in each.ranked):
        counts = [each.ranked[run] for each in found if run in each.ranked]
        steps, predicted = sum(each.layer_steps for each in counts), sum(each.predicted for each in counts)
        if predicted:
            policy, tokens, budget = run
            told = {"policy": policy, "context_tokens": tokens, "budget": budget, "layer_steps": steps}
            result.predicted.append(told | {"share": round(predicted / steps, 4)})


def _collect_mass(result: Result, found: Sequence[Findings]) -> None:
    reports: dict[Run, list[MassReport]] = defaultdict(list)
    for each in found:
        for run, told in each.mass.items():
            reports[run] += [report for report in told if report.least is not None]
    for (policy, tokens, budget), told in reports.items():
        if not told:
            continue
        attended = np.mean([report.attended for report in told], axis=0)
        whole = np.mean([report.whole for report in told], axis=0)
        result.mass.append(
            {
                "policy": policy,
                "context_tokens": tokens,
                "budget": budget,
                "kind": told[0].kind,
                "least": min(report.least for report in told if report.least is not None),
                "mean": float(np.mean([report.mean for report in told])),
                "attended_tokens_by_layer": [round(float(each), 1) for each in attended],
                "whole_steps_by_layer": [round(float(each), 3) for each in whole],
            }
        )


def distinct(answers: Iterable[Answer]) -> list[Answer]:
    """Return the answers, of those by one policy and budget to the same question about a text the first."""
    found: dict[tuple[object, ...], Answer] = {}
    for each in answers:
        key = (
            each.policy, each.budget, each.context_tokens, each.task, each.turn, each.prompt, each.text,
        )  # fmt: skip
        found.setdefault(key, each)
    return list(found.values())


def cells(answers: Iterable[Answer]) -> list[Cell]:
    """Return the mean of the answers for each policy, task, length, budget and turn."""
    grouped: dict[tuple[str, str, int, str, int], list[Answer]] = defaultdict(list)
    for each in answers:
        grouped[each.policy, each.task, each.context_tokens, each.budget, each.turn].append(each)
    return [_cell(key, group) for key, group in grouped.items()]


def _cell(key: tuple[str, str, int, str, int], answers: Sequence[Answer]) -> Cell:
    counted = [each.attended_tokens for each in answers if each.attended_tokens is not None]
    return Cell(
        *key,
        accuracy=round(float(np.mean([each.score for each in answers])), 4),
        prompts=len(answers),
        attended_tokens=round(float(np.mean(counted)), 1) if counted else None,
    )


class AnswersFile:
    """Every answer as a line of JSON, written as its prompt is done: an interrupted run leaves the others.

    What the file held goes with the first answer, and not before there is one. Raises InvalidInput for a
    file that cannot be written.
    """

    def __init__(self, path: Path) -> None:
        check_writable(path)
        self._path = path
        self._stream: TextIO | None = None

    def write(self, found: Findings) -> None:
        """Add the answers to one prompt."""
        if self._stream is None:
            self._stream = self._path.open("w", encoding="utf-8", buffering=1)
        self._stream.writelines(json.dumps(asdict(answer)) + "\n" for answer in found.answers)

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()


def read_answers(path: Path) -> list[Answer]:
    """Read what `AnswersFile` wrote. Raises InvalidInput for anything else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Answer(**json.loads(line)) for line in lines]
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise InvalidInput(f"{path} has not been written by hillinfer eval --answers") from None
