"""The command `hillinfer simulate`. Only wiring."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer


class Config(StrEnum):
    """Which configurations are answered for."""

    paper = "paper"
    ours = "ours"


def simulate_command(
    config: Annotated[Config, typer.Option(help="The paper's configurations, or ours.")] = Config.ours,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables of docs/simulation.md.")
    ] = False,
    show_constants: Annotated[
        bool, typer.Option("--constants", help="Print the constants and their sources instead.")
    ] = False,
    validate: Annotated[
        bool,
        typer.Option("--validate", help="Instead, predict decode steps of this machine and measure them."),
    ] = False,
) -> None:
    """Say how long decode steps take on a machine with an RTX 4090 and a SmartSSD, by a model of events.

    HillInfer's own pools, split and choice of query decide in it. Nothing was measured on such hardware.
    """
    if validate:
        from hillinfer.progress import progress_for_stderr
        from hillinfer.simulate.validate import SHAPES, as_text, compare

        progress = progress_for_stderr()
        result = [compare(progress, tokens, budget) for tokens, budget in SHAPES]
        print(json.dumps(result, indent=2) if as_json else as_text(result))
        return

    from hillinfer.simulate.configurations import constants, ours, paper
    from hillinfer.simulate.report import as_markdown, constants_table

    if show_constants:
        print(json.dumps(constants(), indent=2) if as_json else constants_table(constants()))
        return
    told = paper() if config is Config.paper else ours()
    if as_json:
        print(json.dumps(told, indent=2))
    elif markdown:
        print(as_markdown(told))
    else:
        from rich.console import Console
        from rich.markdown import Markdown

        console = Console()
        if not console.is_terminal:
            console.width = 160
        console.print(Markdown(as_markdown(told)))
