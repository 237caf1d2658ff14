"""`hillinfer simulate --validate`: a decode step of this machine, predicted and measured, in one run.

The parts are measured alone: the model with a cache of the attended tokens only, a turn to the daemon,
ranking by the token, fetching by the row. The events of `step.build` put them together. What the client does
besides, placing rows and keeping counts, is in no part: where the prediction is short, look there.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from hillinfer.attachment import attach
from hillinfer.bench.selections import step
from hillinfer.context import Context
from hillinfer.demo import make_demo
from hillinfer.model_directory import ModelDirectory, bundled_model
from hillinfer.pipeline.choice import Predictor
from hillinfer.pipeline.timeline import MODEL
from hillinfer.private_daemon import PrivateDaemon
from hillinfer.progress import Progress, silent
from hillinfer.run import PREFILL_CHUNK
from hillinfer.session import Session
from hillinfer.simulate.step import build
from hillinfer.simulate.systems import Layer

CONTEXT_TOKENS, BUDGET, STEPS, WARM = 4096, "10%", 24, 8

WITHIN = 0.15
"""The aim: predicted to measured."""

_FEW_TOKENS, _FEW_ROWS, _ROWS = 16, 1, 129


def compare(
    progress: Progress = silent, context_tokens: int = CONTEXT_TOKENS, steps: int = STEPS
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
    parts: dict[str, list[float]] = {}
    with (
        PrivateDaemon() as daemon,
        Session.connect(daemon.socket, name="hillinfer simulate") as session,
        attach(model, session=session, budget=BUDGET, resident="256MiB", predictor="exact") as attachment,
        torch.inference_mode(),
        progress("reading", ids.shape[1] + steps) as advance,
    ):
        cache = attachment.new_cache()
        for first in range(0, ids.shape[1], PREFILL_CHUNK):
            token = step(model, cache, ids[:, first : first + PREFILL_CHUNK])
            advance(min(first + PREFILL_CHUNK, ids.shape[1]))
        (context,) = cache.contexts
        past = context.flushed(0)
        for number in range(steps):
            if number == WARM:
                brought = cache.tally.brought
                before = dict(cache.pipeline.timeline.sums)
            began = perf_counter()
            token = step(model, cache, token)
            took = perf_counter() - began
            if number == 0:
                attended = cache.full_layers[0].slots.attended
                short = DynamicCache()
                step(plain, short, ids[:, :attended])
            advance(ids.shape[1] + number)
            if number < WARM:
                continue
            measured.append(took)
            k = cache.full_layers[0].slots.selected
            for name, spent in _parts(context, query, min(k, past // 2)).items():
                parts.setdefault(name, []).append(spent)
            began = perf_counter()
            step(plain, short, token)
            parts.setdefault("model", []).append(perf_counter() - began)
        spent_s = {
            name: (total - before[lane, name]) / len(measured)
            for (lane, name), total in cache.pipeline.timeline.sums.items()
            if lane == MODEL
        }
        misses = (cache.tally.brought - brought) / len(measured) / text.num_hidden_layers
    part = {name: median(times) for name, times in parts.items()}
    s_per_token = max(0.0, part["half_tokens"] - part["few_tokens"]) / (past // 2 - _FEW_TOKENS)
    s_per_row = (
        max(0.0, part["many_rows"] - part["few_rows"]) / (_ROWS - _FEW_ROWS) / text.num_key_value_heads
    )
    layers = text.num_hidden_layers
    one = Layer(
        project=part["model"] / layers / 4, attend=part["model"] / layers * 3 / 4, weights=0, upload=0,
        delay=part["few_tokens"], scan_card=past * s_per_token, fetch=misses * s_per_row,
    )  # fmt: skip
    simulation, _ = build(one, layers, Predictor.exact)
    predicted, found = simulation.run(), median(measured)
    return {
        "context_tokens": int(ids.shape[1]), "budget": BUDGET, "steps": len(measured),
        "misses_per_layer": misses, "model_s": part["model"], "request_s": part["few_tokens"],
        "rank_s_per_token": s_per_token, "fetch_s_per_row": s_per_row,
        "measured_s": found, "measured_range_s": [min(measured), max(measured)], "predicted_s": predicted,
        "measured_parts_s": spent_s,
        "ratio": predicted / found, "within_aim": abs(predicted / found - 1) <= WITHIN,
    }  # fmt: skip


def as_text(told: dict[str, Any]) -> str:
    """Return the result in two lines."""
    low, high = (f"{each * 1e3:.1f}" for each in told["measured_range_s"])
    verdict = "within" if told["within_aim"] else "not within"
    return (
        f"{told['context_tokens']:,} tokens, budget {told['budget']}, {told['steps']} steps: measured "
        f"{told['measured_s'] * 1e3:.1f} ms ({low} to {high}), predicted {told['predicted_s'] * 1e3:.1f} ms\n"
        f"predicted to measured {told['ratio']:.2f}: {verdict} {WITHIN:.0%}"
    )


def _parts(context: Context, query: npt.NDArray[np.float32], k: int) -> dict[str, float]:
    past, heads = context.flushed(0), context.shape.kv_heads

    def rank(tokens: int, best: int) -> float:
        began = perf_counter()
        context.evaluate(0, query, best, end=tokens)
        return perf_counter() - began

    def fetch(rows: int) -> float:
        ids = [np.linspace(0, past - 1, rows).astype(np.uint32)] * heads
        began = perf_counter()
        context.fetch_rows(0, ids)
        return perf_counter() - began

    return {
        "few_tokens": rank(_FEW_TOKENS, 1),
        "half_tokens": rank(past // 2, k),
        "few_rows": fetch(_FEW_ROWS),
        "many_rows": fetch(_ROWS),
    }
