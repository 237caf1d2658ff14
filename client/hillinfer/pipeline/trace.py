"""A trace of decode steps: trace-event JSON, which Perfetto and Chrome open, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hillinfer.pipeline.timeline import MODEL, NAMES, WORKER, Span, hidden_share
from hillinfer_core.errors import InvalidInput

_THREADS = {MODEL: 1, WORKER: 2}
_STEPS_DRAWN = 2


def as_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """Return the object of the trace-event format: complete events, times in microseconds from the first.

    One thread for each lane; `args` has step and layer. `otherData` has the share that was hidden.
    """
    first = min((span.start for span in spans), default=0.0)
    names = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": lane}}
        for lane, tid in _THREADS.items()
    ]
    events = [
        {
            "name": span.name,
            "cat": "decode",
            "ph": "X",
            "pid": 1,
            "tid": _THREADS[span.lane],
            "ts": round((span.start - first) * 1e6, 3),
            "dur": round((span.end - span.start) * 1e6, 3),
            "args": {"step": span.step, "layer": span.layer},
        }
        for span in sorted(spans, key=lambda span: span.start)
    ]
    hidden = hidden_share((span.lane, span.name, span.end - span.start) for span in spans)
    return {
        "traceEvents": names + events,
        "displayTimeUnit": "ms",
        "otherData": {"hidden_share": hidden},
    }


def write_trace(path: Path, spans: Sequence[Span]) -> None:
    """Write `as_trace` to a file. Raises InvalidInput where that cannot be."""
    try:
        path.write_text(json.dumps(as_trace(spans)), encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot write the trace {path}: {error.strerror}") from error


def draw_trace(path: Path, spans: Sequence[Span]) -> None:
    """Draw the last steps of a trace, .png or .svg, a bar for each span. Needs the extra `plots`."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    last = max((span.step for span in spans), default=0)
    shown = [span for span in spans if span.step > last - _STEPS_DRAWN]
    first = min((span.start for span in shown), default=0.0)
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    axes = figure.subplots()
    used = [name for name in NAMES if any(span.name == name for span in shown)]
    colours = {name: f"C{number}" for number, name in enumerate(NAMES)}
    for span in sorted(shown, key=lambda span: span.start - span.end):
        width = (span.end - span.start) * 1e3
        left = (span.start - first) * 1e3
        axes.barh(
            _THREADS[span.lane], width, left=left, color=colours[span.name], height=0.7, edgecolor="white"
        )
        if span.lane == WORKER and width:
            axes.text(
                left + width / 2, _THREADS[span.lane], str(span.layer), ha="center", va="center", fontsize=7
            )
    axes.set_yticks(list(_THREADS.values()), list(_THREADS))
    axes.invert_yaxis()
    axes.set(xlabel=f"milliseconds; the last {_STEPS_DRAWN} decode steps; numbers are layers")
    figure.legend(
        handles=[Patch(color=colours[name], label=name) for name in used], loc="outside upper center", ncol=7
    )
    figure.savefig(path)
