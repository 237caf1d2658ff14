"""What to evaluate, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hillinfer.eval.paired import Difference
from hillinfer.eval.prompts import TASKS
from hillinfer.model_directory import ModelDirectory
from hillinfer.pinned import pinned_within
from hillinfer.pipeline.choice import Predictor
from hillinfer.policies import POLICIES
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Precision
from hillinfer_core.units import Budget

GUARANTEED = "hillinfer"
"""The policy that can be asked for a share of the attention."""

DEFAULT_TASKS = ("single", "multi_key", "chain1")


@dataclass(frozen=True)
class MassTarget:
    """In the place of a budget: attend to as many tokens as hold this share of the attention."""

    share: float

    def __str__(self) -> str:
        return f"mass>={self.share:g}"


@dataclass(frozen=True)
class EvalJob:
    """What to evaluate. prompts: contexts for each length, dealt to the tasks in turn.

    turns: questions asked in turn on each. perplexity_tokens: of the text after the
    context, fed one by one; 0 for none. metrics: measure selections too. min_mass:
    shares of the attention that hillinfer is also asked for, besides the budgets. predictor: of hillinfer.
    """

    policies: tuple[str, ...]
    context_tokens: tuple[int, ...] = (4096,)
    budgets: tuple[Budget, ...] = (Budget(alpha=0.02),)
    tasks: tuple[str, ...] = DEFAULT_TASKS
    prompts: int = 100
    turns: int = 1
    seed: int = 0
    precision: Precision = Precision.int4
    max_new_tokens: int = 24
    metrics: bool = False
    perplexity_tokens: int = 0
    min_mass: tuple[float, ...] = ()
    predictor: Predictor = Predictor.auto

    def check(self, directory: ModelDirectory, dtype: torch.dtype) -> None:
        """Raise InvalidInput or BudgetTooSmall for what cannot work with the model in `dtype`."""
        for what, given, known in (("policy", self.policies, POLICIES), ("task", self.tasks, TASKS)):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                names = ", ".join(unknown) or "none given"
                raise InvalidInput(f"no such {what}: {names}; there are {', '.join(known)}")
            if len(set(given)) < len(given):
                raise InvalidInput(f"a {what} is named twice in {','.join(given)}")
        if self.prompts < len(self.tasks):
            raise InvalidInput(
                f"{self.prompts} prompts are too few for {len(self.tasks)} tasks: give at least one for each"
            )
        if any(not 0 < share <= 1 for share in self.min_mass):
            raise InvalidInput("min-mass is a share of the attention: above 0 to 1, for example 0.95")
        if self.min_mass and GUARANTEED not in self.policies:
            raise InvalidInput(f"min-mass is for the policy {GUARANTEED}: name it in --policies")
        if self.turns < 1 or self.max_new_tokens < 1:
            raise InvalidInput("turns and max-new-tokens must be at least 1")
        for tokens in self.context_tokens:
            needed = tokens + (self.max_new_tokens + 64) * self.turns + 512
            if directory.positions is not None and needed > directory.positions:
                raise InvalidInput(
                    f"{tokens} context tokens need {needed} positions with questions and answers, but "
                    f"the model has {directory.positions}: give fewer --context-tokens"
                )
            for budget in self.budgets:
                pinned_within(budget.of(tokens), directory.append_unit(dtype))


@dataclass(frozen=True)
class Cell:
    """Answers of one policy to one task's questions of one turn.

    accuracy: mean score. attended_tokens: mean over single-token steps, layers and
    KV heads, sinks and recent window included; None where there was no such step.
    """

    policy: str
    task: str
    context_tokens: int
    budget: str
    turn: int
    accuracy: float
    prompts: int
    attended_tokens: float | None


@dataclass
class Result:
    """What was found. metrics, perplexity and mass are empty unless asked for.

    predicted: share of the layer-steps that attended a predicted selection; empty where none did.
    """

    model: str
    seed: int
    precision: str
    dtype: str
    cells: list[Cell] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    perplexity: list[dict[str, Any]] = field(default_factory=list)
    mass: list[dict[str, Any]] = field(default_factory=list)
    predicted: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        told = asdict(self)
        optional = ("differences", "metrics", "perplexity", "mass", "predicted")
        return {name: value for name, value in told.items() if value or name not in optional}
