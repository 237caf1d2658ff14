"""``hillinferctl cec plan``: planning needs no daemon and no device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Precision, Reduction
from hillinfer_core.units import format_bytes, parse_budget

from .cards import card_named
from .model import read_model
from .planner import LayerPlan, Plan, Request, plan
from .resources import BASIS, LEAVES_OUT

UNVERIFIED = "Computed from the vendor's figures; no part of it was measured on a card."
TIME_LEAVES_OUT = (
    "start of the kernel, DMA set-up, passes over the histogram, merging on the host "
    "and fetching the chosen rows"
)
PARTS = ("NAND", "DRAM", "compute", "link")


def plan_command(
    model: Annotated[
        Path, typer.Option("--model", help="directory of a transformers model; only config.json is read")
    ],
    context: Annotated[str, typer.Option("--context", help="tokens, for example 131072")],
    card: Annotated[str, typer.Option("--card", help="the card: smartssd")] = "smartssd",
    budget: Annotated[
        str, typer.Option("--budget", help="tokens attended a step: a number or a per cent")
    ] = "2%",
    precision: Annotated[
        str | None, typer.Option("--precision", help="int8 or int4 (default: the faster)")
    ] = None,
    reduction: Annotated[str, typer.Option("--reduction", help="sum or max over the query heads")] = "sum",
    guarantee: Annotated[
        bool, typer.Option("--guarantee", help="plan the mode that bounds the lost mass")
    ] = False,
    lanes: Annotated[str | None, typer.Option("--lanes", help="key elements multiplied in a cycle")] = None,
    heads: Annotated[str | None, typer.Option("--heads-in-flight", help="heads with scores on chip")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object; bytes and seconds")] = False,
) -> None:
    """Print the plan as JSON or as tables; raises the typed errors of the planner."""
    made = plan(
        Request(
            model=read_model(model),
            context=_whole(context, "--context"),
            card=card_named(card),
            budget=parse_budget(budget),
            precision=Precision(_choice(precision, list(Precision), "--precision")) if precision else None,
            reduction=Reduction(_choice(reduction, [Reduction.sum, Reduction.max], "--reduction")),
            guarantee=guarantee,
            lanes=_whole(lanes, "--lanes") if lanes is not None else None,
            heads_in_flight=_whole(heads, "--heads-in-flight") if heads is not None else None,
        )
    )
    if as_json:
        print(json.dumps(to_plain(made), indent=2))
    else:
        _show(made, Console())


def to_plain(made: Plan) -> dict[str, Any]:
    """Return the plan as JSON-ready values: sizes in bytes, times in seconds, rates in bytes a second."""
    request, shape, used, budget = (
        made.request,
        made.request.model.shape,
        made.resources,
        made.request.card.budget,
    )
    return {
        "model": {
            "name": request.model.name,
            "layers": shape.layers,
            "evaluated_layers": len(request.model.evaluated),
            "query_heads": request.model.query_heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "positions": request.model.positions,
        },
        "context": request.context,
        "card": request.card.name,
        "configuration": made.kernel.name,
        "precision": made.precision.value,
        "query_bits": made.query_bits,
        "reduction": "none" if request.guarantee else request.reduction.value,
        "lanes": made.lanes,
        "heads_in_flight": made.heads_in_flight,
        "runs_per_head": made.runs,
        "ddr_saturated": made.ddr_saturated,
        "residency": {
            "evaluation_key_bytes": sum(layer.key_bytes for layer in made.layers),
            "dram_usable_bytes": made.dram_usable_bytes,
            "dram_bytes": sum(layer.dram_bytes for layer in made.layers),
            "nand_bytes": sum(layer.nand_bytes for layer in made.layers),
        },
        "layers": [_layer(layer) for layer in made.layers],
        "token": {"time_s": made.token_s, "bottleneck": made.bottleneck},
        "time_leaves_out": TIME_LEAVES_OUT,
        "resources": {
            "basis": BASIS,
            "leaves_out": LEAVES_OUT,
            "used": {
                "lut": used.lut,
                "dsp": used.dsp,
                "ff": used.ff,
                "bram36": used.bram36,
                "uram": used.uram,
            },
            "budget": {
                "lut": budget.lut,
                "dsp": budget.dsp,
                "ff": budget.ff,
                "bram36": budget.bram36,
                "uram": budget.uram,
            },
        },
        "reasons": list(made.reasons),
        "unverified": UNVERIFIED,
    }


def _layer(layer: LayerPlan) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "evaluation_key_bytes": layer.key_bytes,
        "dram_bytes": layer.dram_bytes,
        "nand_bytes": layer.nand_bytes,
        "time_s": layer.time_s,
        "bottleneck": layer.bottleneck,
        "seconds": {part: layer.seconds[part] for part in PARTS},
    }


def _show(made: Plan, console: Console) -> None:
    request, shape, size = made.request, made.request.model.shape, format_bytes
    facts = Table(show_header=False, box=None)
    for name, value in (
        (
            "model",
            f"{request.model.name}: {shape.layers} layers, {shape.kv_heads} KV heads of {shape.head_dim}",
        ),
        ("context", f"{request.context:,} tokens, budget {request.budget}"),
        ("card", request.card.title),
        ("configuration", made.kernel.name),
        ("precision", f"{made.precision.value} keys, {made.query_bits}-bit query"),
        ("lanes", f"{made.lanes}, {made.heads_in_flight} heads in flight"),
        ("time of a token", f"{made.token_s * 1e3:.2f} ms, set by {made.bottleneck}"),
    ):
        facts.add_row(name, value)
    console.print(facts)
    console.print()
    table = Table("layers", "keys", "in DRAM", "from NAND", "ms", "set by", *PARTS, box=None)
    for first, last, layer in _alike(made.layers):
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            size(layer.key_bytes),
            size(layer.dram_bytes),
            size(layer.nand_bytes),
            f"{layer.time_s * 1e3:.3f}",
            layer.bottleneck,
            *(f"{layer.seconds[part] * 1e3:.3f}" for part in PARTS),
        )
    console.print(table)
    console.print("Columns from NAND to link: milliseconds that each part of a layer needs; they overlap.\n")
    used, budget = made.resources, request.card.budget
    table = Table("resource", "used", "left by the shell", box=None)
    for name in ("lut", "dsp", "ff", "bram36", "uram"):
        table.add_row(name.upper(), f"{getattr(used, name):,}", f"{getattr(budget, name):,}")
    console.print(table)
    console.print(f"Resources: {BASIS}. Left out: {LEAVES_OUT}.\n", soft_wrap=True)
    for reason in made.reasons:
        console.print(f"- {reason}", soft_wrap=True, markup=False)
    console.print(f"{UNVERIFIED} Times leave out {TIME_LEAVES_OUT}.", soft_wrap=True)


def _alike(layers: tuple[LayerPlan, ...]) -> list[tuple[int, int, LayerPlan]]:
    """Group runs of layers whose plans differ in nothing but the number."""
    runs: list[tuple[int, int, LayerPlan]] = []
    for layer in layers:
        same = runs and runs[-1][1] == layer.layer - 1 and runs[-1][2].dram_bytes == layer.dram_bytes
        if same:
            runs[-1] = (runs[-1][0], layer.layer, runs[-1][2])
        else:
            runs.append((layer.layer, layer.layer, layer))
    return runs


def _whole(text: str, option: str) -> int:
    # int() takes signs, underscores and thousands of digits.
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InvalidInput(f"{option} must be a whole number, not {text!r:.40}")
    return int(text)


def _choice(text: str, allowed: list[Any], option: str) -> str:
    if text not in allowed:
        raise InvalidInput(f"{option} must be one of {', '.join(allowed)}, not {text!r:.40}")
    return text
