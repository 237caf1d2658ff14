"""The commands of `hillinfer bench`. Only wiring."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

app = typer.Typer(help="Measure this machine.", no_args_is_help=True, pretty_exceptions_enable=False)

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
        console.width = 100
    console.print(
        f"{machine['processor']}, {machine['threads']} threads, {machine['instructions'][-1]}; "
        f"medians of {machine['repeats']}"
    )
    table = Table("shape", "keys", "stream", "scores", "of stream", "+ top-k, bins", "of stream", "added")
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
                f"{each['fraction_of_stream']:.2f}", f"{ms['rank_histogram']:.2f} ms",
                f"{each['fraction_of_stream_with_topk']:.2f}", f"{each['topk_overhead']:.0%}",
            )  # fmt: skip
            times = [each["peers"][name] for name in result["peers"]]
            peers.add_row(
                title, keys, f"{ms['rank']:.2f}",
                *("not installed" if time is None else f"{time['ms']:.1f}" for time in times),
            )  # fmt: skip
    console.print(table)
    console.print(peers)
