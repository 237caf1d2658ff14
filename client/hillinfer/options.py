"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

DeviceOption = Annotated[
    str,
    typer.Option(help="Where the model runs: auto (a GPU where there is one), cpu, cuda, cuda:1 and so on."),
]
