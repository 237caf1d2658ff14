"""`hillinfer simulate --validate`: decode steps of this machine, predicted and measured, in one run.

The parts are measured alone (`parts`, and the model with a cache of the attended tokens only), between
the steps that they predict; what the client does for a layer besides, on a text that its pinned tokens
hold. The events of `step.build` put them together; nothing is fitted to a measured step.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

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
from hillinfer.simulate.parts import AskingTimer, PlacingTimer
from hillinfer.simulate.step import build
from hillinfer.simulate.systems import Layer

SHAPES = tuple((tokens, budget) for tokens in (2048, 4096, 8192) for budget in ("2%", "10%"))
"""Contexts and budgets that are compared."""

STEPS, WARM = 32, 8

WITHIN = 0.15
"""The aim: predicted to measured."""

_SHORT = 24
"""Tokens of a text of which nothing is ranked: its steps show what the client does for a layer besides."""


def compare(
    progress: Progress = silent, context_tokens: int = 4096, budget: str = "10%", steps: int = STEPS
) -> dict[str, Any]:
    """Return measured and predicted seconds of a step, medians, and the parts.

    The parts are measured between the steps, so that both see the same load. Blocks for seconds; raises
    what `attach` raises.
    """
    directory = ModelDirectory(bundled_model())
    model, plain = directory.load(torch.float32), directory.load(torch.float32)
    ids = directory.tokenizer(
        make_demo(directory.tokenizer, context_tokens).context, return_tensors="pt"
    ).input_ids
    text = model.config.get_text_config(decoder=True)
    query = np.random.default_rng(0).standard_normal((text.num_attention_heads, text.head_dim), np.float32)
    measured: list[float] = []
    computing: list[float] = []
    beside: list[float] = []
    with (
        PrivateDaemon() as daemon,
        Session.connect(daemon.socket, name="hillinfer simulate") as session,
        attach(model, session=session, budget=budget, resident="256MiB", predictor="exact") as attachment,
        torch.inference_mode(),
        progress("reading", ids.shape[1] + steps) as advance,
    ):
        cache, tiny = attachment.new_cache(), attachment.new_cache()
        for part in chunks(ids.shape[1]):
            token = step(model, cache, ids[:, part])
            advance(part.stop)
        step(model, tiny, ids[:, :_SHORT])
        for _ in range(WARM):
            token = step(model, cache, token)
        layer = cache.full_layers[0]
        short, tiny_plain = _plain(plain, ids[:, : layer.slots.attended]), _plain(plain, ids[:, :_SHORT])
        (context,) = cache.contexts
        asking = AskingTimer(context, query, layer.slots.selected, layer.slots.selected + layer.hot.capacity)
        placing = PlacingTimer(layer.slots, layer.hot, len(cache.full_layers))
        selected, brought = cache.tally.selected, cache.tally.brought
        before = dict(cache.pipeline.timeline.sums)
        for number in range(steps - WARM):
            took, following = _timed(model, cache, token)
            measured.append(took)
            asking.sample()
            placing.sample()
            computing.append(_timed(plain, short, token)[0])
            if number < 8:  # of the pinned tokens' room, so that nothing is ranked
                alone, _ = _timed(plain, tiny_plain, token)
                beside.append(_timed(model, tiny, token)[0] - alone)
            token = following
            advance(ids.shape[1] + WARM + number)
        layers = text.num_hidden_layers
        taken = (cache.tally.selected - selected) / len(measured) / layers
        misses = (cache.tally.brought - brought) / len(measured) / layers
        spent_s = {
            name: (total - before[lane, name]) / len(measured)
            for (lane, name), total in cache.pipeline.timeline.sums.items()
            if lane == MODEL
        }
        past = context.flushed(0)
    ask, place, model_s = asking.result(), placing.result(), median(computing)
    one = Layer(
        project=model_s / layers / 4, attend=model_s / layers * 3 / 4, weights=0, upload=0,
        client=max(0.0, median(beside)) / layers, delay=ask.turn,
        scan_card=past * ask.token + taken * ask.selected, fetch=misses * ask.row,
        place=place.seconds(round(taken), misses),
    )  # fmt: skip
    simulation, _ = build(one, layers, Predictor.exact)
    predicted, found = simulation.run(), median(measured)
    return {
        "context_tokens": int(ids.shape[1]), "budget": budget, "steps": len(measured),
        "selected_per_layer": taken, "misses_per_layer": misses, "layers": layers,
        "model_s": model_s, "layer": vars(one), "asking_s": vars(ask), "placing_s": vars(place),
        "measured_s": found, "measured_range_s": [min(measured), max(measured)], "predicted_s": predicted,
        "measured_parts_s": spent_s,
        "ratio": predicted / found, "within_aim": abs(predicted / found - 1) <= WITHIN,
    }  # fmt: skip


def _timed(model: PreTrainedModel, cache: Any, token: torch.Tensor) -> tuple[float, torch.Tensor]:
    began = perf_counter()
    following = step(model, cache, token)
    return perf_counter() - began, following


def _plain(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache()
    step(model, cache, ids)
    return cache


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
