"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hillinfer.pipeline.choice import Predictor

DeviceOption = Annotated[
    str,
    typer.Option(help="Where the model runs: auto (a GPU where there is one), cpu, cuda, cuda:1 and so on."),
]

PredictorOption = Annotated[
    Predictor,
    typer.Option(
        help="The query that ranks the tokens: exact waits for the layer's own, the others rank meanwhile; "
        "auto chooses for each layer."
    ),
]
CpuShareOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|SHARE",
        help="Of the tokens, ranked by the CPU while the drive ranks the others: 0 to 1, or auto for both "
        "to finish together.",
        show_default="none",
    ),
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Run on a private daemon whose drive, in memory, is paced to that of another: smartssd.",
    ),
]
TraceOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write who worked when in decode steps, for Perfetto, as JSON."),
]
TracePlotOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw the last decode steps of it, .png or .svg.")
]
