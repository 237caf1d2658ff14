"""Which query ranks: chosen by what was measured, and seldom measured where that is clear."""

import pytest

from hillinfer.pipeline import choice
from hillinfer.pipeline.choice import Measured, Predictor, choose


def measured(loss, slack=2.0, samples=10, previous=0.5):
    losses = {Predictor.next_layer: loss, Predictor.previous_step: previous}
    return Measured(evaluate_s=1.0, slack_s=slack, loss=losses, samples=samples)


@pytest.mark.parametrize(
    ("current", "seen", "attended", "expected"),
    [
        ("exact", measured(0.1), 82, "next_layer"),
        ("exact", measured(0.1), 41, "exact"),  # too few tokens for a predicted query
        ("exact", measured(0.1, samples=2), 82, "exact"),  # too little known
        ("exact", measured(0.07, samples=1), 82, "next_layer"),  # clear at once
        ("exact", measured(0.18), 82, "exact"),  # loses more than it may to be chosen
        ("next_layer", measured(0.18), 82, "next_layer"),  # but not more than it may to stay
        ("next_layer", measured(0.3), 82, "exact"),
        ("exact", measured(0.1, slack=0.2), 82, "exact"),  # hides too little
        ("exact", measured(0.1, slack=None), 82, "next_layer"),  # nothing says that it does
        ("next_layer", measured(0.1, slack=0.2), 82, "next_layer"),
        ("next_layer", measured(0.1, slack=0.05), 82, "exact"),
        ("exact", measured(0.3, previous=0.01), 82, "previous_step"),
        ("previous_step", measured(0.1, previous=0.01), 82, "next_layer"),
        ("previous_step", measured(0.3, previous=0.2), 82, "exact"),
    ],
)
def test_the_choice(current, seen, attended, expected):
    assert choose(Predictor(current), seen, attended) == expected


def test_samples_become_rare_while_they_clearly_confirm_the_choice():
    seen, sampled = Measured(), []
    for step in range(600):
        if choice.is_sampled(seen, step):
            loss = 0.12 if step < 3 else 0.2 if step > 300 else 0.02
            seen.lost({Predictor.next_layer: loss})
            sampled.append(step)
            seen.look_again(step, 2, confirmed=seen.is_clear(Predictor.next_layer))
    # Three while it is in doubt, then every 32nd, less often once it is clear, and every 32nd in doubt again.
    assert sampled == [0, 1, 2, 30, 62, 94, 158, 286, 414, 446, 478, 510, 542, 574]


def test_losses_and_times_run_with_what_is_measured():
    seen = Measured()
    for _ in range(20):
        seen.timed(0.002, 0.004)
        seen.lost({Predictor.next_layer: 0.1})
    assert seen.hidden(Predictor.next_layer) == 1
    for _ in range(20):
        seen.timed(0.020, 0.004)
        seen.lost({Predictor.next_layer: 0.5})
    assert seen.hidden(Predictor.next_layer) == pytest.approx(0.2, abs=0.01)
    assert seen.loss[Predictor.next_layer] == pytest.approx(0.5, abs=0.01)
    assert seen.samples == 40
