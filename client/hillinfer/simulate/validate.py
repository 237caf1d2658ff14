"""`hillinfer simulate --validate`: decode steps of this machine, predicted and measured, in one run.

The parts are measured alone, between the steps that they predict. The model, with what the client does for a
layer of which nothing is ranked: on a text that its pinned tokens hold. Turns to the daemon, and selecting
and attending with answers that are there at once, take turns with the layers of those steps, which are timed
without them. The events of `step.build` put them together; nothing is fitted to a measured step.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from hillinfer.attachment import attach
from hillinfer.bench.selections import step
from hillinfer.demo import make_demo
from hillinfer.model_directory import ModelDirectory, bundled_model
from hillinfer.pipeline.choice import Predictor
from hillinfer.pipeline.timeline import MODEL
from hillinfer.prefill import chunks
from hillinfer.private_daemon import PrivateDaemon
from hillinfer.progress import Progress, silent
from hillinfer.session import Session
from hillinfer.simulate.parts import AskingTimer, Between, Questions, SelectingTimer
from hillinfer.simulate.step import build
from hillinfer.simulate.systems import Layer

SHAPES = tuple((tokens, budget) for tokens in (2048, 4096, 8192) for budget in ("2%", "10%"))
"""Contexts and budgets that are compared."""

STEPS, WARM = 32, 8

WITHIN = 0.15
"""The aim: predicted to measured."""

_SHORT = 24
"""Tokens of a text of which nothing is ranked, with room for a step of each kind."""


def compare(
    progress: Progress = silent, context_tokens: int = 4096, budget: str = "10%", steps: int = STEPS
) -> dict[str, Any]:
    """Return measured and predicted seconds of a step, medians, and the parts.

    The parts are measured between the steps, so that both see the same load. Blocks for seconds; raises
    what `attach` raises.
    """
    directory = ModelDirectory(bundled_model())
    model = directory.load(torch.float32)
    ids = directory.tokenizer(
        make_demo(directory.tokenizer, context_tokens).context, return_tensors="pt"
    ).input_ids
    text = model.config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    measured: list[float] = []
    computing: list[float] = []
    with (
        PrivateDaemon() as daemon,
        Session.connect(daemon.socket, name="hillinfer simulate") as session,
        attach(model, session=session, budget=budget, resident="256MiB", predictor="exact") as attachment,
        Between(model) as between,
        torch.inference_mode(),
        progress("reading", ids.shape[1] + steps) as advance,
    ):  # fmt: skip
        cache, tiny = attachment.new_cache(), attachment.new_cache()
        for part in chunks(ids.shape[1]):
            token = step(model, cache, ids[:, part])
            advance(part.stop)
        step(model, tiny, ids[:, :_SHORT])
        cache.policy = questions = Questions()
        token = step(model, cache, token)
        asking = AskingTimer(session, questions, layers)
        query = torch.from_numpy(questions.latest[0].query)[None, :, None]
        selecting = SelectingTimer(attachment.new_cache(), tiny, query)
        kinds = (*asking.kinds, *selecting.kinds)
        for number in range(steps):
            if number == WARM:
                asking.times.forget()
                selecting.times.forget()
                selected, brought = cache.tally.selected, cache.tally.brought
                before = dict(cache.pipeline.timeline.sums)
            took, following = _timed(model, cache, token)
            selecting.follow(cache)
            parts = [between.step(tiny, token, kind) for kind in kinds]
            tiny.crop(_SHORT)
            if number >= WARM:
                measured.append(took)
                computing += parts
            token = following
            advance(ids.shape[1] + number)
        taken = (cache.tally.selected - selected) / len(measured) / layers
        misses = (cache.tally.brought - brought) / len(measured) / layers
        spent_s = {
            name: (total - before[lane, name]) / len(measured)
            for (lane, name), total in cache.pipeline.timeline.sums.items()
            if lane == MODEL
        }
    ask, model_s = asking.result(), median(computing)
    one = Layer(
        project=model_s / layers / 4, attend=model_s / layers * 3 / 4, weights=0, upload=0,
        delay=ask.turn / layers, scan_card=(ask.tokens + ask.selected) / layers, fetch=ask.rows / layers,
        place=selecting.result() / layers,
    )  # fmt: skip
    simulation, _ = build(one, layers, Predictor.exact)
    predicted, found = simulation.run(), median(measured)
    return {
        "context_tokens": int(ids.shape[1]), "budget": budget, "steps": len(measured),
        "selected_per_layer": taken, "misses_per_layer": misses, "layers": layers,
        "model_s": model_s, "layer": vars(one), "asking_s": vars(ask),
        "measured_s": found, "measured_range_s": [min(measured), max(measured)], "predicted_s": predicted,
        "measured_parts_s": spent_s,
        "ratio": predicted / found, "within_aim": abs(predicted / found - 1) <= WITHIN,
    }  # fmt: skip


def _timed(model: PreTrainedModel, cache: Any, token: torch.Tensor) -> tuple[float, torch.Tensor]:
    began = perf_counter()
    following = step(model, cache, token)
    return perf_counter() - began, following


def as_text(told: list[dict[str, Any]]) -> str:
    """Return the comparisons as a table."""
    lines = [
        "| context | budget | measured, ms | range | predicted | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for each in told:
        low, high = (f"{s * 1e3:.1f}" for s in each["measured_range_s"])
        lines.append(
            f"| {each['context_tokens']:,} | {each['budget']} | {each['measured_s'] * 1e3:.1f} "
            f"| {low} to {high} | {each['predicted_s'] * 1e3:.1f} | {each['ratio']:.2f} |"
        )
    within = sum(each["within_aim"] for each in told)
    return "\n".join([*lines, "", f"{within} of {len(told)} predictions are within {WITHIN:.0%}"])
