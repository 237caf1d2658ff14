"""The command `hillinfer bench kvpath`. Only wiring."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Precision
from hillinfer_core.units import parse_budget, parse_bytes


def kvpath_command(
    shape: Annotated[str, typer.Option(help="Of a layer: 8b or 1b.")] = "8b",
    context_tokens: Annotated[int, typer.Option(min=1024, help="Length of the text.")] = 32768,
    budget: Annotated[
        list[str],
        typer.Option(
            help="Tokens attended: a per cent of the past, or a count; SYSTEM=BUDGET for one alone."
        ),
    ] = ["2%"],  # noqa: B006 - Typer takes it, nobody changes it
    profile: Annotated[
        str, typer.Option(help="Drive that the pool is paced to: smartssd or none.")
    ] = "smartssd",
    systems: Annotated[
        str | None, typer.Option(help="Comma-separated.", show_default="all; an unknown name lists them")
    ] = None,
    resident: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of each system.",
            show_default="a quarter of the layers' KV, and the arena",
        ),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Of the evaluation keys.")] = Precision.int4,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the systems take turns.")] = 5,
    pool_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the pool lies; memory is faster than any card.")
    ] = Path("/dev/shm"),
    recording: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep the bundled model's keys and queries here (.npz), or take them."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the values, and of channels that the model lacks.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the table too, as .png or .svg.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Measure how long a layer takes from its query to staged KV, beside rivals on the same drive.

    Keys and queries are the bundled model's, so that selections repeat and move as a model's do.
    """
    import torch

    from hillinfer.bench.kvpath.measure import measure
    from hillinfer.bench.kvpath.plot import draw
    from hillinfer.bench.kvpath.recording import recorded
    from hillinfer.bench.kvpath.report import as_markdown, as_object
    from hillinfer.bench.kvpath.rig import ARENA_BYTES, rig
    from hillinfer.bench.kvpath.systems import SYSTEMS
    from hillinfer.bench.kvpath.workload import SHAPES, make_workload
    from hillinfer.eval.plot import check_file
    from hillinfer.kv_shape import KvShape
    from hillinfer.pinned import pinned_within
    from hillinfer.private_daemon import PrivateDaemon
    from hillinfer.progress import progress_for_stderr

    if plot is not None:
        check_file(plot)
    names = list(SYSTEMS) if systems is None else [name.strip() for name in systems.split(",")]
    for what, given, known in (("system", names, SYSTEMS), ("shape", [shape], SHAPES)):
        if unknown := [name for name in given if name not in known]:
            raise InvalidInput(f"no such {what}: {', '.join(unknown)}; there are {', '.join(known)}")
    own = dict(each.split("=", 1) for each in budget if "=" in each)
    common = [each for each in budget if "=" not in each] or ["2%"]
    if len(common) > 1 or set(own) - set(SYSTEMS):
        raise InvalidInput("give one --budget for all, and others as SYSTEM=BUDGET")
    budgets = {name: parse_budget(own.get(name, common[0])) for name in names}

    progress = progress_for_stderr()
    if recording is None or not recording.exists():
        unit = KvShape(1, SHAPES[shape].kv_heads, SHAPES[shape].head_dim).append_unit(torch.float16)
        for each in budgets.values():
            pinned_within(each.of(context_tokens), unit)
        with PrivateDaemon(pool_dir=pool_dir, profile=profile):
            pass  # as with budgets, what is wrong is said before the recording, which takes minutes
    workload = make_workload(recorded(recording, context_tokens, progress), SHAPES[shape], seed)
    quarter = (workload.keys.nbytes + workload.values.nbytes) // 4
    held = parse_bytes(resident) if resident else quarter + ARENA_BYTES
    with ExitStack() as stack:
        ready = stack.enter_context(rig(workload, profile, precision, held, pool_dir))
        streaming = None
        if not all(SYSTEMS[name].keys_in_memory for name in names):
            streaming = stack.enter_context(
                rig(workload, profile, precision, held, pool_dir, keys_in_memory=False)
            )
        rows = measure(ready, streaming, budgets, rounds, progress)
    told = as_object(rows, shape, workload, profile, precision)
    if plot is not None:
        draw(told, plot)
    print(json.dumps(told, indent=2) if as_json else as_markdown(told))
