"""Which query ranks a layer's tokens: chosen online from what it hides and what it loses."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Predictor(StrEnum):
    """The query that ranks a layer's tokens in a decode step.

    exact: its own, on the critical path. next_layer: what it would make of the input of the layer
    before, ranked meanwhile. previous_step: its own of the step before. auto: chosen for each layer.
    """

    auto = "auto"
    exact = "exact"
    next_layer = "next_layer"
    previous_step = "previous_step"


SAFE_TOKENS = 80
"""Attended tokens below which a predicted query costs answers: of 50 questions at 4K, next_layer
answers 49 with 2 % (82 tokens) and 34 with 1 % (41), the exact query 49 with both."""

ENTER_LOSS = {Predictor.next_layer: 0.15, Predictor.previous_step: 0.05}
"""Attention that a predicted set may lack to be chosen. Our choice, seen with 2 % at 4K: next_layer
lacks 0.005 to 0.12 by layer and costs no answers, previous_step 0.01 to 0.57 and costs a quarter."""

LEAVE_LOSS = {predictor: 1.4 * loss for predictor, loss in ENTER_LOSS.items()}
"""And to stay. Our choice."""

ENTER_HIDDEN, LEAVE_HIDDEN = 0.25, 0.10
"""Share of evaluation and fetch that must be hidden for a prediction to be chosen, to stay. Our choice."""

CLEAR = 0.5
"""Share of the loss to be chosen up to which there is little doubt. Our choice."""

MIN_SAMPLES = 3
"""Sampled steps before a layer leaves the exact query; one does where that is clear. Our choice."""

SAMPLE_EVERY, SAMPLE_AT_MOST = 32, 128
"""Steps of a layer between two that are sampled once it has enough samples: at first, and then twice as many
each time that a sample clearly confirms the choice, at most. Our choice."""

_KEPT = 0.25  # weight of a new figure in a running one


@dataclass
class Measured:
    """What one layer showed so far. Times in seconds; a loss is a share of the attention, 0 to 1."""

    evaluate_s: float | None = None
    slack_s: float | None = None
    """From asking to the layer's attention: as much as this could be hidden."""
    loss: dict[Predictor, float] = field(default_factory=dict)
    samples: int = 0
    every: int = 0
    """Steps between samples, the latest."""
    due: int = 0
    """Step of the next one."""

    @property
    def enough(self) -> bool:
        """Whether there were samples enough to leave the exact query."""
        return self.samples >= MIN_SAMPLES or any(self.is_clear(predictor) for predictor in self.loss)

    def is_clear(self, predictor: Predictor) -> bool:
        """Whether `predictor` loses so little that there is little doubt."""
        return predictor in self.loss and self.loss[predictor] <= CLEAR * ENTER_LOSS[predictor]

    def look_again(self, step: int, layer: int, *, confirmed: bool) -> None:
        """Have the next sample after this `step`; layers take turns."""
        self.every = min(2 * self.every, SAMPLE_AT_MOST) if confirmed else SAMPLE_EVERY
        self.due = step + self.every - (step + layer) % SAMPLE_EVERY

    def timed(self, evaluate_s: float, slack_s: float) -> None:
        """Count a prefetch, but a layer's first: how long it took, and how long the layer did without it."""
        self.evaluate_s = _running(self.evaluate_s, evaluate_s)
        self.slack_s = _running(self.slack_s, slack_s)

    def lost(self, losses: dict[Predictor, float]) -> None:
        """Count a sampled step: what each prediction would have lost."""
        self.samples += 1
        for predictor, loss in losses.items():
            self.loss[predictor] = _running(self.loss.get(predictor), loss)

    def hidden(self, predictor: Predictor) -> float:
        """The share of evaluation and fetch that `predictor` can hide; all, as long as none was timed."""
        if predictor is Predictor.previous_step:
            return 1.0  # it has the time of all other layers
        if not self.evaluate_s or self.slack_s is None:
            return 1.0
        return min(1.0, self.slack_s / self.evaluate_s)


def is_sampled(measured: Measured, step: int) -> bool:
    """Whether the layer's `step` also ranks with the exact query."""
    return not measured.enough or step >= measured.due


def choose(current: Predictor, measured: Measured, attended: int) -> Predictor:
    """Return the predictor of the next steps, with hysteresis: `current` stays unless clearly worse.

    attended: tokens of a step, the pinned ones included.
    """
    if attended < SAFE_TOKENS or not measured.enough:
        return Predictor.exact
    for predictor in (Predictor.next_layer, Predictor.previous_step):
        stays = predictor is current
        loss = measured.loss.get(predictor)
        if (
            loss is not None
            and loss <= (LEAVE_LOSS if stays else ENTER_LOSS)[predictor]
            and measured.hidden(predictor) >= (LEAVE_HIDDEN if stays else ENTER_HIDDEN)
        ):
            return predictor
    return Predictor.exact


def _running(before: float | None, new: float) -> float:
    return new if before is None else before + _KEPT * (new - before)
