"""The commands of `hillinfer bench`. Only wiring."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hillinfer.bench.decode.command import decode_command, parse_counts
from hillinfer.bench.kvpath.command import kvpath_command
from hillinfer.files import check_writable
from hillinfer_core.errors import InvalidInput
from hillinfer_core.units import parse_budget

app = typer.Typer(help="Measure this machine.", no_args_is_help=True, pretty_exceptions_enable=False)

app.command("kvpath")(kvpath_command)
app.command("decode")(decode_command)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command("kernel")
def kernel_command(
    repeats: Annotated[int, typer.Option(min=3, help="Rounds; medians are taken.")] = 31,
    as_json: JsonOption = False,
) -> None:
    """Compare the host kernel with a streaming read of the same bytes, and with numpy, torch and numba.

    Memory speed varies with what else runs: repeat it. torch and numba are left out where they are missing.
    """
    from hillinfer.bench.kernel import bench_kernel
    from hillinfer.progress import progress_for_stderr

    result = bench_kernel(repeats, progress_for_stderr())
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print_kernel(result)


def _print_kernel(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = result["machine"]
    console = Console()
    if not console.is_terminal:
        console.width = 110
    console.print(
        f"{machine['processor']}, {machine['threads']} threads, {machine['instructions'][-1]}; "
        f"medians of {machine['repeats']}"
    )
    table = Table(
        "shape", "keys", "stream", "scores", "of stream", "+ top-k", "added", "+ top-k, bins", "of stream",
        "added",
    )  # fmt: skip
    peers = Table(
        "shape", "keys", "kernel", *(f"{name}, ms" for name in result["peers"]), title="the same job"
    )
    for shape in result["shapes"]:
        title = f"{shape['tokens']:,} x {shape['kv_heads']} x {shape['head_dim']}"
        for keys in ("int8", "int4"):
            each = shape[keys]
            ms = each["ms"]
            table.add_row(
                title, keys, f"{each['stream_bytes_per_s'] / 1e9:.1f} GB/s", f"{ms['scores']:.2f} ms",
                f"{each['fraction_of_stream']:.2f}", f"{ms['rank']:.2f} ms",
                f"{each['topk_alone_overhead']:.0%}", f"{ms['rank_histogram']:.2f} ms",
                f"{each['fraction_of_stream_with_topk']:.2f}", f"{each['topk_overhead']:.0%}",
            )  # fmt: skip
            times = [each["peers"][name] for name in result["peers"]]
            peers.add_row(
                title, keys, f"{ms['rank']:.2f}",
                *("not installed" if time is None else f"{time['ms']:.1f}" for time in times),
            )  # fmt: skip
    console.print(table)
    console.print(peers)


@app.command("placement")
def placement_command(
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="A local transformers model directory.", show_default="the bundled one"
        ),
    ] = None,
    context_tokens: Annotated[int, typer.Option(min=512, help="Least length of the text.")] = 16384,
    budget: Annotated[str, typer.Option(help="Tokens attended: a per cent of the past, or a count.")] = "2%",
    questions: Annotated[int, typer.Option(min=1, help="Asked in turn; they jump about in the text.")] = 8,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Generated after each question.")] = 24,
    as_json: JsonOption = False,
) -> None:
    """Compare what is read from the cold pool with placing the tokens of the highest last scores in memory.

    The model answers questions about the demo's text; what its steps select is replayed against both.
    """
    parsed = parse_budget(budget)

    from hillinfer.bench.placement import SHARES, as_markdown, as_object, compare
    from hillinfer.bench.selections import record
    from hillinfer.model_directory import ModelDirectory, bundled_model
    from hillinfer.progress import progress_for_stderr

    directory = ModelDirectory(model or bundled_model())
    depth = round(max(SHARES) * context_tokens * 1.25)
    recording = record(
        directory, context_tokens, str(parsed), depth, questions, answer_tokens, progress_for_stderr()
    )
    told = as_object(recording, str(parsed), compare(recording))
    print(json.dumps(told, indent=2) if as_json else as_markdown(told))


@app.command("transport")
def transport_command(
    calls: Annotated[int, typer.Option(min=25, help="Evaluations by each transport.")] = 1000,
    clients: Annotated[
        int, typer.Option(min=0, max=64, help="Also measure what as many processes get together.")
    ] = 0,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long those ask.")] = 5.0,
    pool_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where the pool lies.")] = Path("/dev/shm"),
    as_json: JsonOption = False,
) -> None:
    """Measure the round trip of the smallest evaluation, by gRPC and by the ring in shared memory."""
    from hillinfer.bench.transport import bench_transport

    result = bench_transport(calls, pool_dir, clients, seconds)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    for name, figures in result.items():
        print(
            f"{name:12} p50 {figures['p50_us']:6,} us   p99 {figures['p99_us']:6,} us   "
            f"above the ranking: p50 {figures['above_p50_us']:6,} us   p99 {figures['above_p99_us']:6,} us"
        )
        if clients:
            print(f"{'':12} {clients} clients together: {figures['per_s']:,} evaluations/s")


@app.command("recall")
def recall_command(
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="A local transformers model directory.", show_default="the bundled one"
        ),
    ] = None,
    context_tokens: Annotated[int, typer.Option(min=64, help="Least length of the text.")] = 4096,
    budget: Annotated[str, typer.Option(help="Tokens chosen: a per cent of the past, or a count.")] = "2%",
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Measure a Qwen3 with random weights after it.")
    ] = False,
    coarse: Annotated[
        bool, typer.Option("--coarse", help="Measure a coarse pass over tiles before the ranking instead.")
    ] = False,
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables of docs/recall.md.")] = False,
) -> None:
    """Say what quantised evaluation keys lose: recall and captured attention mass for each layer.

    The text is the demo's: the Python standard library's sources with notes hidden in them, and a question.
    """
    parsed = parse_budget(budget)

    from hillinfer.bench.recall import as_markdown, as_object, measure, untrained_qwen3
    from hillinfer.demo import make_demo
    from hillinfer.model_directory import ModelDirectory, bundled_model, dtype_named
    from hillinfer.progress import progress_for_stderr

    directory = ModelDirectory(model or bundled_model())
    demo = make_demo(directory.tokenizer, context_tokens)
    tokens = directory.tokenizer(f"{demo.context}\n{demo.questions[0]}")["input_ids"]
    models = [(directory.path.name, directory.load(dtype_named("float32")))]
    if untrained:
        models.append(("Qwen3, untrained", untrained_qwen3(len(directory.tokenizer))))
    progress = progress_for_stderr()
    results = {name: measure(loaded, tokens, parsed, progress, coarse=coarse) for name, loaded in models}
    if as_json:
        told = {"tokens": len(tokens), "budget": budget}
        print(json.dumps(told | {name: as_object(layers) for name, layers in results.items()}, indent=2))
        return
    tables = [
        as_markdown(f"{name}, {len(tokens):,} tokens, {budget}", each) for name, each in results.items()
    ]
    if markdown:
        print("\n\n".join(tables))
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown("\n\n".join(tables)))


@app.command("sharing")
def sharing_command(
    pool_dir: Annotated[Path, typer.Option(help="Directory of the cold pool, 2 GiB.")] = Path("/dev/shm"),
    tokens: Annotated[int, typer.Option(min=2048, help="Length of each application's context.")] = 32768,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians and ranges are told.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each part of a round takes.")] = 4.0,
    as_json: JsonOption = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of docs/performance.md.")
    ] = False,
) -> None:
    """Say what several applications of several users get of one drive, under the profile of a SmartSSD.

    Run it as root, so that there can be several users. Times vary with what else runs: repeat it.
    """
    from hillinfer.bench.sharing import as_markdown, measure
    from hillinfer.progress import progress_for_stderr

    found = measure(pool_dir, tokens // 2048 * 2048, rounds, seconds, progress_for_stderr())
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    if markdown:
        print(as_markdown(found))
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(as_markdown(found)))


@app.command("split")
def split_command(
    profile: Annotated[str, typer.Option(help="What the drive is paced to.")] = "smartssd",
    slow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="cpu|drive@STEP",
            help="Have that side a third as fast from a step on; repeat it for several runs.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2048, help="Length of the context.")] = 32768,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the 8B shape.")] = 4,
    rounds: Annotated[int, typer.Option(min=3, help="Of drive, CPU and both, in turn.")] = 30,
    steps: Annotated[int, typer.Option(min=30, help="Of each run of the split.")] = 80,
    pool_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where the pool lies.")] = Path("/dev/shm"),
    as_json: JsonOption = False,
) -> None:
    """Measure whether CPU and drive finish together when both rank, what it is worth, and after a change.

    Layers of an 8B model's shape and of the bundled one's. Times vary with what else runs: repeat it.
    """
    from hillinfer.bench.split import as_markdown, measure, parse_slow, setups
    from hillinfer.progress import progress_for_stderr

    changes = [parse_slow(each, steps) for each in slow or []]
    found = [
        measure(setup, pool_dir, profile, rounds, steps, changes, progress_for_stderr())
        for setup in setups(tokens, layers)
    ]
    print(json.dumps({"setups": found}, indent=2) if as_json else as_markdown(found))


@app.command("growth")
def growth_command(
    axes: Annotated[
        str | None,
        typer.Option(metavar="NAME;NAME", help="What grows.", show_default="all; an unknown name lists them"),
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(metavar="N,N", help="To what it grows, instead of the usual sizes.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the sizes take turns.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps in a round.")] = 8,
    pool_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the pool lies.", show_default="the daemon's usual place"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it, .png or .svg.")] = None,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what is measured here (JSON), and tell and draw all of it."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how time, bytes and reads of a decode step grow with text, layers, batch and applications.

    A small model with made-up KV: what it costs to rank, fetch and place, with next to no arithmetic besides.
    """
    from hillinfer.bench.decode.growth import AXES, measure
    from hillinfer.bench.decode.growth_fits import as_markdown, draw, read_axes
    from hillinfer.eval.plot import check_file

    check_writable(keep)
    if plot is not None:
        check_file(plot)
    names = list(AXES) if axes is None else [name.strip() for name in axes.split(";")]
    if unknown := [name for name in names if name not in AXES]:
        raise InvalidInput(f"nothing grows by {', '.join(unknown)}; there are {'; '.join(AXES)}")
    found = read_axes(keep) if keep is not None and keep.exists() else []
    for name in names:
        told = measure(
            name, pool_dir, rounds, steps, lambda line: print(line, file=sys.stderr, flush=True),
            [] if sizes is None else parse_counts(sizes, "--sizes"),
        )  # fmt: skip
        found = [each for each in found if each["axis"] != name] + [told]
        if keep is not None:
            keep.write_text(json.dumps({"axes": found}, indent=1))
    if plot is not None:
        draw(found, plot)
    print(json.dumps({"axes": found}, indent=2) if as_json else as_markdown(found))
