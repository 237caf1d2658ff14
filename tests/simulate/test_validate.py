"""A predicted step of this machine beside a measured one: the figures agree with each other, not in time."""

import pytest

from hillinfer.simulate.validate import WARM, as_text, compare


def test_prediction_and_measurement_are_of_the_same_steps():
    told = compare(context_tokens=700, budget="20%", steps=WARM + 2)
    assert told["steps"] == 2
    low, high = told["measured_range_s"]
    assert 0 < low <= told["measured_s"] <= high
    assert told["ratio"] == pytest.approx(told["predicted_s"] / told["measured_s"])
    # Nothing overlaps with the exact query: all layers' parts, one after another.
    one, layers = told["layer"], told["layers"]
    parts = ("project", "delay", "scan_card", "fetch", "place", "attend")
    assert told["predicted_s"] == pytest.approx(layers * sum(one[name] for name in parts))
    assert told["selected_per_layer"] >= told["misses_per_layer"] >= 0
    assert "predictions are within" in as_text([told])
