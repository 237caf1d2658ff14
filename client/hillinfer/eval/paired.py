"""How much two policies differ, from their answers to the same questions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hillinfer_core.errors import InvalidInput

if TYPE_CHECKING:
    from hillinfer.eval.findings import Answer

_Z_95 = 1.96  # of the normal distribution, two-sided

Key = tuple[int, str, int, str]
"""What the answers of two policies have in common: context tokens, task, prompt, fingerprint of the text."""


@dataclass(frozen=True)
class Difference:
    """Accuracy of `policy` less that of `baseline` over the same prompts, in points (hundredths).

    low, high: its 95 % interval. context_tokens: the lengths pooled. prompts: the
    pairs; of several questions on one context the mean counts, as they are not independent.
    """

    policy: str
    budget: str
    baseline: str
    context_tokens: tuple[int, ...]
    points: float
    low: float
    high: float
    prompts: int


def scores(answers: Iterable[Answer]) -> dict[Key, float]:
    """Return the mean score for each prompt; of one policy, budget and turn or of several questions."""
    by_prompt: dict[Key, list[float]] = defaultdict(list)
    for answer in answers:
        key = answer.context_tokens, answer.task, answer.prompt, answer.text
        by_prompt[key].append(answer.score)
    return {key: sum(each) / len(each) for key, each in by_prompt.items()}


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, low, high): the 95 % interval of the mean of paired differences, each from -1 to 1.

    Agresti and Min (2005): Wald's interval for matched pairs after half a pair is
    added to each of the four outcomes, which keeps it honest when few pairs differ. For scores between 0
    and 1 likewise: two pairs more, and 1 more in the sum of squares.
    """
    total, squares = math.fsum(differences), math.fsum(each * each for each in differences)
    count = len(differences) + 2
    centre = total / count
    error = math.sqrt(max(0.0, (squares + 1) / count - centre * centre) / count)
    return total / len(differences), max(-1.0, centre - _Z_95 * error), min(1.0, centre + _Z_95 * error)


def compare(
    policy: str, budget: str, mine: dict[Key, float], baseline: str, theirs: dict[Key, float]
) -> Difference | None:
    """Return how `mine` differs from `theirs` over the prompts that both have; None without any.

    Raises InvalidInput where both have prompts of a length, and not one text in common.
    """
    common = sorted(mine.keys() & theirs.keys())
    if not common:
        if {key[0] for key in mine} & {key[0] for key in theirs}:
            raise InvalidInput(
                f"{policy} and {baseline} were not asked about the same texts (other seeds, turns or "
                "tokenisers, another Python): their answers cannot be paired"
            )
        return None
    points, low, high = (100 * each for each in interval([mine[key] - theirs[key] for key in common]))
    lengths = tuple(sorted({key[0] for key in common}))
    return Difference(
        policy, budget, baseline, lengths, round(points, 2), round(low, 2), round(high, 2), len(common)
    )


def compare_files(
    policy: str, name: str, mine: Sequence[Answer], other: str, theirs: Sequence[Answer]
) -> list[Difference]:
    """Compare the answers of `policy` in two evaluations, called `name` and `other`, by budget.

    Raises InvalidInput as `compare` does.
    """
    found = []
    for budget in dict.fromkeys(each.budget for each in mine if each.policy == policy):
        ours, others = (
            scores(a for a in answers if (a.policy, a.budget) == (policy, budget))
            for answers in (mine, theirs)
        )
        found.append(compare(f"{policy} in {name}", budget, ours, f"{policy} in {other}", others))
    return [each for each in found if each is not None]


def differences(answers: Sequence[Answer], baseline: str = "full") -> list[Difference]:
    """Compare every other policy and budget with `baseline`: at each length, then over all lengths.

    A per cent is another number of tokens at each length, but the same budget. Raises InvalidInput as
    `compare` does.
    """
    theirs = scores(answer for answer in answers if answer.policy == baseline)
    found = []
    for policy, budget in dict.fromkeys((a.policy, a.budget) for a in answers if a.policy != baseline):
        mine = scores(a for a in answers if (a.policy, a.budget) == (policy, budget))
        lengths = sorted({key[0] for key in mine})
        for pool in [{tokens} for tokens in lengths] + ([set(lengths)] if len(lengths) > 1 else []):
            part = {key: score for key, score in mine.items() if key[0] in pool}
            found.append(compare(policy, budget, part, baseline, theirs))
    return [each for each in found if each is not None]
