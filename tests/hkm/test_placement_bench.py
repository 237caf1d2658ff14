"""`hillinfer bench placement`: the replay is what a run does, and the figures are what they claim to be."""

import itertools

import numpy as np
import pytest

from hillinfer.bench.placement import (
    as_markdown,
    as_object,
    clairvoyant_reads,
    compare,
    hkm_reads,
    top_m_reads,
)
from hillinfer.bench.selections import Recording, record
from hillinfer.model_directory import ModelDirectory, bundled_model


def made(seed, steps=9, tokens=7, taken=2, heads=1):
    rng = np.random.default_rng(seed)
    order = [
        np.stack([rng.permutation(tokens) for _ in range(heads)]).astype(np.uint32) for _ in range(steps)
    ]
    return Recording(tokens, 0, 8, tokens, [0], {0: order}, [taken] * steps, [tokens] * steps)


@pytest.fixture(scope="module")
def recording():
    return record(ModelDirectory(bundled_model()), 1024, "80", depth=256, questions=2, answer_tokens=7)


def test_the_replay_reads_what_the_run_read(recording):
    assert recording.steps == 14
    assert recording.first_steps == [0, 7]
    assert len(recording.order) == 8
    assert hkm_reads(recording, max(recording.tokens) + 80).sum() == recording.brought > 0


def test_the_table_and_the_object(recording):
    told = as_object(recording, "80", compare(recording, (0.01, 0.1, 0.2)))
    assert [each["rows_held"] for each in told["placements"]] == [
        round(share * recording.context_tokens) for share in (0.1, 0.2)
    ]
    for each in told["placements"]:
        assert each["clairvoyant"] <= each["hkm"]
        assert each["ratio"] == each["hkm"] / each["top_m"]
        assert each["hkm_bytes_per_step"] == each["hkm"] * 2 * 64 * 4
    assert as_markdown(told).count("\n| ") == 3


def test_top_m_reads_every_row_that_it_places_and_lacks():
    for seed in range(20):
        recording = made(seed, heads=2)
        held, expected = [set(), set()], np.zeros(recording.steps, int)
        for step, order in enumerate(recording.order[0]):
            for head in range(2):
                placed = set(order[head, :4])
                expected[step] += len(placed - held[head])
                held[head] = placed
        assert top_m_reads(recording, 4).tolist() == expected.tolist()


def test_nobody_reads_less_than_the_clairvoyant():
    for seed in range(10):
        recording = made(seed, steps=5, tokens=5)
        selected = [set(order[0, :2].tolist()) for order in recording.order[0]]
        # Every way of keeping 3 of the tokens after each step.
        best = {frozenset(): 0}
        for wanted in selected:
            after = {}
            for held, cost in best.items():
                cost += len(wanted - held)
                there = held | wanted
                for kept in itertools.combinations(sorted(there), min(3, len(there))):
                    kept = frozenset(kept)
                    if kept >= wanted:
                        after[kept] = min(cost, after.get(kept, 99))
            best = after
        assert clairvoyant_reads(recording, 3).sum() == min(best.values())
        assert hkm_reads(recording, 3).sum() >= min(best.values())
