"""A predicted step of this machine beside a measured one: the figures agree with each other, not in time."""

import pytest

from hillinfer.simulate.validate import WARM, as_text, compare


def test_prediction_and_measurement_are_of_the_same_steps():
    told = compare(context_tokens=700, steps=WARM + 2)
    assert told["steps"] == 2
    low, high = told["measured_range_s"]
    assert 0 < low <= told["measured_s"] <= high
    assert told["ratio"] == pytest.approx(told["predicted_s"] / told["measured_s"])
    # Nothing overlaps with the exact query: all layers' parts, one after another.
    layers = 8
    ranked = told["context_tokens"] * told["rank_s_per_token"] * layers
    least = told["model_s"] + layers * (
        told["request_s"] + told["misses_per_layer"] * told["fetch_s_per_row"]
    )
    assert least <= told["predicted_s"] * 1.0001
    assert told["predicted_s"] <= (least + ranked) * 1.0001
    assert "predicted to measured" in as_text(told)
