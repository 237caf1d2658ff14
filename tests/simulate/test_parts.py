"""The parts of a step are timed on what the steps were: the same questions, the same selections."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import hillinfer
from hillinfer.bench.decode.subject import of_shape
from hillinfer.bench.selections import step
from hillinfer.private_daemon import PrivateDaemon
from hillinfer.simulate.parts import AskingTimer, Between, Questions, SelectingTimer, Times

LAYERS, STEPS = 2, 6


def test_what_counts_are_the_sums_of_steps():
    times = Times(3)
    for seconds in (1, 1, 10, 2, 20, 2, 3, 3, 3):
        times.add("turn", seconds)
    assert times.of_step("turn") == 12  # the median of a layer would make it 9
    times.forget()
    for seconds in (1, 1, 1):
        times.add("turn", seconds)
    assert times.of_step("turn") == 3


def plain_cache(model):
    cache = DynamicCache()
    step(model, cache, torch.zeros((1, 8), dtype=torch.int64))
    return cache


@pytest.fixture(scope="module")
def replayed():
    """Steps with all kinds of parts between them: what both caches held, and what the timers asked."""
    subject = of_shape("tiny")
    model, plain = subject.load(torch.float32, "cpu"), subject.load(torch.float32, "cpu")
    found = SimpleNamespace(held=[], asked=[])
    with (
        PrivateDaemon() as daemon,
        hillinfer.Session.connect(daemon.socket) as session,
        hillinfer.attach(
            model, session=session, budget="10%", resident="64MiB", predictor="exact"
        ) as attachment,
        Between(plain) as bare,
        torch.inference_mode(),
    ):
        cache, tiny, replay = (attachment.new_cache() for _ in range(3))
        token = step(model, cache, subject.text(1200))
        step(model, tiny, subject.text(20))
        cache.policy = questions = Questions()
        token = step(model, cache, token)
        selecting = SelectingTimer(replay, tiny, torch.zeros(1, 4, 1, 32))
        asking = AskingTimer(session, questions, LAYERS)
        ask, kinds = session.evaluate_and_bring, (*asking.kinds, *selecting.kinds)

        def noted(layer, items):
            (answer,) = ask(layer, items)
            found.asked.append((items[0].k, items[0].end - items[0].first, sum(answer.missing_per_head)))
            return [answer]

        for _ in range(STEPS):
            token = step(model, cache, token)
            selecting.follow(cache)
            session.evaluate_and_bring = noted
            for kind in kinds:
                bare.step(plain_cache(plain), token, kind)
            session.evaluate_and_bring = ask
            held = [
                [np.sort(layer.slots.ids, axis=-1) for layer in each.full_layers] for each in (cache, replay)
            ]
            found.held.append(held)
        found.k, found.brought = questions.latest[0].k, replay.tally.brought
        found.ask, found.select = asking.result(), selecting.result()
    return found


def test_selections_are_replayed_into_pools_of_their_own(replayed):
    for real, mine in replayed.held:
        np.testing.assert_array_equal(real, mine)
    assert not np.array_equal(replayed.held[0][0], replayed.held[-1][0])  # something moved
    assert replayed.brought > 0


def test_questions_are_put_again_with_less_in_them_each_time(replayed):
    asked = np.array(replayed.asked).reshape(STEPS, 4, LAYERS, 3)
    whole, kept, one, few = asked.transpose(1, 0, 2, 3)
    assert (whole[..., 0] == replayed.k).all()
    assert (kept[..., :2] == whole[..., :2]).all()
    assert whole[..., 2].sum() > 0
    assert (kept[..., 2] == 0).all()
    assert (one[..., 1] == whole[..., 1]).all()
    assert (one[..., 0] == 1).all()
    assert (few[..., 1] == 64).all()
    ask = replayed.ask
    assert ask.turn > 0
    assert min(ask.tokens, ask.selected, ask.rows, replayed.select) >= 0


def test_work_between_layers_is_done_in_that_step_and_ends_with_the_hooks():
    model = of_shape("tiny").load(torch.float32, "cpu")
    layers = []
    with torch.inference_mode():
        with Between(model) as between:
            between.step(plain_cache(model), torch.zeros((1, 1), dtype=torch.int64), layers.append)
            assert layers == [0, 1]
            plain_cache(model)
        plain_cache(model)
    assert layers == [0, 1]
