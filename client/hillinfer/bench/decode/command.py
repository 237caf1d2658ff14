"""The command `hillinfer bench decode`. Only wiring."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hillinfer.files import check_writable
from hillinfer.options import PredictorOption
from hillinfer.pipeline.choice import Predictor
from hillinfer.simulate.machine import GPUS
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Precision
from hillinfer_core.units import parse_budget


def decode_command(
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="A local transformers model directory.", show_default="the bundled one"
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Instead: random weights of a model of that shape, 8b or 1b.")
    ] = None,
    context_tokens: Annotated[
        str, typer.Option(metavar="N[,N]", help="Lengths of the text, one after another.")
    ] = "4096,16384",
    batch: Annotated[str, typer.Option(metavar="N[,N]", help="Sequences at once.")] = "1",
    budget: Annotated[str, typer.Option(help="Tokens attended: a per cent of the past, or a count.")] = "2%",
    held: Annotated[
        float,
        typer.Option(
            min=0.001, max=1, help="Share of the whole KV that may be held besides evaluation keys."
        ),
    ] = 0.098,
    precision: Annotated[Precision, typer.Option(help="Of the evaluation keys.")] = Precision.int4,
    predictor: PredictorOption = Predictor.auto,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda and so on.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of weights and KV.", show_default="float32 for a CPU that computes, else bfloat16"
        ),
    ] = None,
    systems: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:DTYPE],...",
            help="hillinfer, default and offloaded, caches of transformers.",
            show_default="on a CPU that computes hillinfer,default,default:bfloat16, else all three",
        ),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Drive that the pool is paced to: smartssd.", show_default="none")
    ] = None,
    pace_compute: Annotated[
        str | None,
        typer.Option(
            metavar="GPU",
            help="Have the model's layers not compute but wait as long as the simulator says that GPU takes: "
            f"{' or '.join(GPUS)}. KV is made up.",
            show_default="they compute",
        ),
    ] = None,
    pool_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the pool lies.", show_default="the daemon's usual place"),
    ] = None,
    readings: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Times that each reads the text; 0 for made-up KV.",
            show_default="1; paced or with a recording none",
        ),
    ] = None,
    recording: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With a --shape: rank the bundled model's keys by its queries over a text of that length; "
            "they are kept here (.npz), or taken from there.",
            show_default="the random weights' own",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the systems take turns.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps in a round.")] = 16,
    time_limit: Annotated[
        float, typer.Option(metavar="SECONDS", help="For each context; no round begins later.")
    ] = 3600.0,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep rows here after each round, beside those that it has (JSON)."
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the last context's trace, for Perfetto.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw rates and bytes held, .png or .svg.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print tables as Markdown.")] = False,
) -> None:
    """Measure decoding, reading and asking beside transformers' own caches, side by side in one run.

    With random weights or made-up KV only times and bytes mean anything. Times vary with what else runs.
    """
    parse_budget(budget)
    for file in (keep, trace):
        check_writable(file)

    from hillinfer.bench.decode.measure import Plan, measure_cell
    from hillinfer.bench.decode.plot import draw
    from hillinfer.bench.decode.replay import Replay
    from hillinfer.bench.decode.report import Rows, as_markdown, as_object
    from hillinfer.bench.decode.stand_in import paced
    from hillinfer.bench.decode.subject import SHAPES, of_directory, of_shape
    from hillinfer.bench.decode.systems import NAMES, OFFLOADED, Setup
    from hillinfer.bench.kvpath.recording import recorded
    from hillinfer.eval.plot import check_file
    from hillinfer.model_directory import bundled_model, device_named, dtype_named
    from hillinfer.progress import progress_for_stderr

    if plot is not None:
        check_file(plot)
    if shape is not None and (model is not None or shape not in SHAPES):
        raise InvalidInput(f"give --model or --shape, and of shapes one of {', '.join(SHAPES)}")
    on_cpu = device_named(device) == "cpu" and pace_compute is None
    if pace_compute is not None and readings:
        raise InvalidInput("a model that only waits reads no text: leave out --readings")
    read = 1 if readings is None and pace_compute is None and recording is None else readings or 0
    lengths = parse_counts(context_tokens, "--context-tokens")
    if recording is not None and (shape is None or pace_compute is not None or read or len(lengths) > 1):
        raise InvalidInput("--recording is for a --shape that computes, one length, and made-up KV")
    chosen = []
    usual = "hillinfer,default,default:bfloat16" if on_cpu else ",".join(NAMES)
    for each in (systems or usual).split(","):
        name, _, own = each.strip().partition(":")
        if name not in NAMES:
            raise InvalidInput(f"no such system: {name}; there are {', '.join(NAMES)}")
        if name == OFFLOADED and on_cpu:
            raise InvalidInput("an offloaded cache needs a GPU to be offloaded from: leave out offloaded")
        chosen.append((name, dtype_named(own or dtype or ("float32" if on_cpu else "bfloat16"))))
    if pace_compute is not None and any(kind.itemsize != 2 for _, kind in chosen):
        raise InvalidInput("a GPU's times are those of 2-byte weights and KV: leave out --dtype")

    subject = of_shape(shape) if shape is not None else of_directory(model or bundled_model())
    rows = Rows(keep)
    for tokens in lengths:
        replay = None
        if recording is not None:
            what = recorded(recording, tokens, progress_for_stderr(), device_named(device))
            replay = Replay(what, subject.kv_shape, subject.config.num_attention_heads, tokens)
        for sequences in parse_counts(batch, "--batch"):
            plan = Plan(chosen, tokens, read, rounds, steps, time_limit)
            of_cell = subject if pace_compute is None else paced(subject, pace_compute, sequences)
            longest = plan.tokens(max(each.shape[1] for each in subject.questions))
            setup = Setup(
                of_cell, device_named(device), sequences, budget, held, longest, profile, predictor.value,
                precision, pool_dir, trace, replay,
            )  # fmt: skip
            measure_cell(setup, plan, _say, rows.put)
    told = as_object(rows.rows)
    if plot is not None:
        draw(told, plot)
    if as_json:
        print(json.dumps(told, indent=2))
        return
    _show(as_markdown(told), plain=markdown)


def _show(text: str, *, plain: bool) -> None:
    if plain:
        print(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))


def parse_counts(text: str, name: str) -> list[int]:
    """Return the numbers of option `name`. Raises InvalidInput for others than numbers of at least 1."""
    try:
        counts = [int(each) for each in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise InvalidInput(f"{name} takes numbers of at least 1 with commas between them, not {text!r}")
    return counts


def _say(line: Any) -> None:
    print(line, file=sys.stderr, flush=True)
