"""`hillinfer bench recall`: what quantised evaluation keys lose, layer by layer, on a real text.

The model reads a text; the last queries of it rank all tokens before them. A ranking by quantised keys is
compared with one by the model's own, in float64: *recall* is the share of the same tokens chosen, and
*captured mass* the attention that the chosen tokens get, of all that those ranked get, by each query head's
softmax. Both are means over KV heads, or query heads, and queries. `--coarse` tells the same of a ranking by
the model's own keys that a coarse pass over tiles goes before (`coarse.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hillinfer.bench.coarse import screened
from hillinfer.progress import Progress
from hillinfer_core import kernel
from hillinfer_core.errors import InvalidInput, UnsupportedModel
from hillinfer_core.layout import Precision, Reduction
from hillinfer_core.units import Budget

QUERIES = 16
"""Queries that are measured: those of the last tokens of the text."""

_NAME = "hillinfer_recall"

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Captured:
    """What attention saw in one layer: queries [Hq, QUERIES, D], keys [Hkv, n, D], both after RoPE."""

    queries: npt.NDArray[np.float32]
    keys: npt.NDArray[np.float32]
    scaling: float


@dataclass(frozen=True)
class Choice:
    """One way of ranking in one layer. ``recall`` is None for the model's own keys, the measure of others."""

    keys: str
    reduction: str
    recall: float | None
    mass: float


def measure(
    model: PreTrainedModel, tokens: list[int], budget: Budget, progress: Progress, *, coarse: bool = False
) -> dict[str, list[Choice]]:
    """Return the choices of every layer, by its number; the model reads all `tokens` in one step.

    coarse: only those of the model's own keys, with a coarse pass before and without.
    """
    if len(tokens) <= 2 * QUERIES:
        raise InvalidInput(f"a text of {len(tokens)} tokens is too short: give {2 * QUERIES + 1} or more")
    with progress("reading", 1), _capturing(model) as layers, torch.inference_mode():
        model(torch.tensor([tokens]), use_cache=False, logits_to_keep=1)
    if not layers:
        raise UnsupportedModel(f"{type(model).__name__} does not use the attention interface")
    results = {}
    with progress("ranking", len(layers)) as tick:
        for done, (number, seen) in enumerate(sorted(layers.items())):
            results[str(number)] = (_coarse_choices if coarse else _choices)(seen, budget)
            tick(done + 1)
    return results


@contextmanager
def _capturing(model: PreTrainedModel) -> Iterator[dict[int, Captured]]:
    layers: dict[int, Captured] = {}

    def attention(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, scaling: float | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        if key.shape[2] == query.shape[2]:
            layers[getattr(module, "layer_idx", len(layers))] = Captured(
                query[0, :, -QUERIES:].float().numpy(),
                key[0].float().contiguous().numpy(),
                query.shape[-1] ** -0.5 if scaling is None else scaling,
            )
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield layers
    finally:
        model.set_attn_implementation(before)


def _choices(seen: Captured, budget: Budget) -> list[Choice]:
    keys, products, weights, k = _past(seen, budget)
    choices = []
    for reduction in (Reduction.sum, Reduction.max):
        reduced = products.sum(axis=1) if reduction is Reduction.sum else products.max(axis=1)
        own = _best(reduced, k)
        choices.append(Choice("own", reduction.value, None, _mass(weights, own)))
        for precision in Precision:
            ids = _ranked(keys, seen.queries, precision, reduction, k)
            choices.append(Choice(precision.value, reduction.value, _shared(own, ids), _mass(weights, ids)))
    return choices


def _past(seen: Captured, budget: Budget) -> tuple[npt.NDArray[np.float32], F64, F64, int]:
    """Return keys [Hkv, past, D], products and weights [Hkv, group, queries, past], how many to choose."""
    kv_heads, tokens, dim = seen.keys.shape
    past = tokens - QUERIES
    keys = np.ascontiguousarray(seen.keys[:, :past])
    products = np.einsum(
        "hgqd,hnd->hgqn",
        seen.queries.reshape(kv_heads, -1, QUERIES, dim).astype(np.float64),
        keys.astype(np.float64),
    )
    logits = products * seen.scaling
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return keys, products, weights, max(1, budget.of(past))


def _coarse_choices(seen: Captured, budget: Budget) -> list[Choice]:
    keys, products, weights, k = _past(seen, budget)
    reduced = products.sum(axis=1)
    own = _best(reduced, k)
    choices = [Choice("own", "sum", None, _mass(weights, own))]
    queries = seen.queries.reshape(len(keys), -1, QUERIES, keys.shape[2]).sum(axis=1)
    for way, part, kept in screened(keys, queries):
        if kept.sum(axis=-1).min() < k:
            continue  # fewer than the budget are left to choose from
        ids = _best(np.where(kept, reduced, -np.inf), k)
        choices.append(Choice(f"{way} 1/{part}", "sum", _shared(own, ids), _mass(weights, ids)))
    return choices


def _best(scores: F64, k: int) -> npt.NDArray[np.int64]:
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def _shared(own: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> float:
    """Share of the ids that are the `own` ones, mean over heads and queries."""
    k = int(own.shape[-1])
    pairs = zip(own.reshape(-1, k), ids.reshape(-1, k), strict=True)
    same = float(np.mean([len(np.intersect1d(a, b, assume_unique=True)) for a, b in pairs]))
    return same / k


def _ranked(
    keys: npt.NDArray[np.float32],
    queries: npt.NDArray[np.float32],
    precision: Precision,
    reduction: Reduction,
    k: int,
) -> npt.NDArray[np.int64]:
    """Return the ids [Hkv, queries, k] that evaluation chooses."""
    ranges = kernel.fit_ranges(keys, precision)
    tiles, _, _ = kernel.quantise_keys(np.stack((keys, keys), axis=2), ranges, precision)
    ids = []
    for number in range(queries.shape[1]):
        q, offsets, _ = kernel.quantise_query(np.ascontiguousarray(queries[:, number]), ranges, reduction)
        ranked = kernel.rank([tiles], q, precision, 0, keys.shape[1], k, offsets=offsets)
        ids.append(ranked.ids.astype(np.int64))
    return np.stack(ids, axis=1)


def _mass(weights: F64, ids: npt.NDArray[np.int64]) -> float:
    chosen = np.take_along_axis(
        weights, np.broadcast_to(ids[:, None], (*weights.shape[:3], ids.shape[-1])), -1
    )
    return float(chosen.sum(axis=-1).mean())


def as_object(layers: dict[str, list[Choice]]) -> dict[str, Any]:
    """Return what `--json` prints of a model."""
    return {"layers": {number: [asdict(choice) for choice in each] for number, each in layers.items()}}


def as_markdown(title: str, layers: dict[str, list[Choice]]) -> str:
    """Return a table with a row for each layer and one for their mean."""
    ways = [(choice.keys, choice.reduction) for choice in next(iter(layers.values()))]
    heads = [
        f"{keys.upper()} {reduction}" if keys != "own" else f"own keys {reduction}"
        for keys, reduction in ways
    ]
    lines = [f"**{title}**", "", f"| layer | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    rows = list(layers.items())
    for number, choices in rows:
        lines.append(f"| {number} | {' | '.join(_cell(choice.recall, choice.mass) for choice in choices)} |")
    means = []
    for at in range(len(ways)):
        column = [choices[at] for _, choices in rows]
        recalls = [choice.recall for choice in column if choice.recall is not None]
        recall = float(np.mean(recalls)) if recalls else None
        means.append(_cell(recall, float(np.mean([choice.mass for choice in column]))))
    lines.append(f"| mean | {' | '.join(means)} |")
    return "\n".join(lines)


def _cell(recall: float | None, mass: float) -> str:
    return f"{mass:.3f}" if recall is None else f"{recall:.3f} / {mass:.3f}"


def untrained_qwen3(vocabulary: int) -> PreTrainedModel:
    """Return a Qwen3 of 4 layers with random weights, the same each time.

    Another architecture (normalised queries and keys, 2 query heads for each KV head, head dimension 128). It
    has learnt nothing: its attention is spread evenly over the text, the hardest case for recall and one
    in which it matters least.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, max_position_embeddings=65536,
    )  # fmt: skip
    model: PreTrainedModel = Qwen3ForCausalLM(config)
    model.eval()  # type: ignore[no-untyped-call]
    return model
