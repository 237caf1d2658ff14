"""The commands of `hillinfer`. Only wiring: what takes long to import is imported when a command runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hillinfer.bench.commands import app as bench_app
from hillinfer.eval.commands import eval_command, report_command
from hillinfer.files import check_writable
from hillinfer.options import (
    CpuShareOption,
    DeviceOption,
    PredictorOption,
    ProfileOption,
    TraceOption,
    TracePlotOption,
)
from hillinfer.pipeline.choice import Predictor
from hillinfer.simulate.commands import simulate_command
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Precision
from hillinfer_core.units import Budget, parse_budget, parse_bytes

if TYPE_CHECKING:
    from hillinfer.report import Answer

app = typer.Typer(
    help="Long-context inference with the KV cache in a daemon's cold pool.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
app.command("eval")(eval_command)
app.command("eval-report")(report_command)
app.command("simulate")(simulate_command)


class Dtype(StrEnum):
    """Of weights and KV rows."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


BudgetOption = Annotated[
    str | None,
    typer.Option(
        help="Tokens attended in each step: a per cent of the past, or a count.",
        show_default="2%, at least 72 tokens",
    ),
]
MinMassOption = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Instead of a budget, attend to as many tokens as hold this share of the attention, for "
        "example 0.95: proven with int8, estimated with int4.",
    ),
]
ResidentOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for KV, client and daemon together, for example 64MiB.",
        show_default="the larger of 16MiB and a quarter of the context's KV, and sliding windows",
    ),
]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(
        help="Of the evaluation keys, which rank the tokens.", show_default="int4; int8 with --min-mass"
    ),
]
SocketOption = Annotated[
    Path | None,
    typer.Option(
        help="Attach socket of a running daemon.", show_default="the usual one, or a private daemon"
    ),
]
ContextNameOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Keep the text's KV under this name; later runs on the same text and model do not read it "
        "again. Without a running daemon, one is started that ends when it is idle.",
    ),
]
ContextGroupOption = Annotated[
    str | None,
    typer.Option(metavar="GROUP", help="Members of this group of yours may read --context-name too."),
]
ContextOwnerOption = Annotated[
    str | None,
    typer.Option(metavar="USER", help="Whose --context-name is, if they let a group of yours read it."),
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Of weights and KV.", show_default="the model's own")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command("run")
def run_command(
    model: Annotated[Path, typer.Option(metavar="DIR", help="A local transformers model directory.")],
    context: Annotated[Path, typer.Option(metavar="FILE", help="The text, UTF-8.")],
    ask: Annotated[list[str], typer.Option(metavar="TEXT", help="A question; repeat it for more.")],
    budget: BudgetOption = None,
    min_mass: MinMassOption = None,
    resident: ResidentOption = None,
    precision: PrecisionOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    socket: SocketOption = None,
    context_name: ContextNameOption = None,
    context_group: ContextGroupOption = None,
    context_owner: ContextOwnerOption = None,
    predictor: PredictorOption = Predictor.auto,
    cpu_share: CpuShareOption = None,
    profile: ProfileOption = None,
    trace: TraceOption = None,
    trace_plot: TracePlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a text once and answer questions about it, one after another, each answer one line."""
    text = _read(context)
    parsed_budget, parsed_resident = (
        _budget(budget, min_mass),
        None if resident is None else parse_bytes(resident),
    )

    check_writable(trace)
    _check_picture(trace_plot)
    from hillinfer.model_directory import ModelDirectory, device_named, dtype_named
    from hillinfer.progress import progress_for_stderr
    from hillinfer.run import Job, run

    directory = ModelDirectory(model)
    job = Job(
        text,
        ask,
        parsed_budget,
        parsed_resident,
        precision,
        max_new_tokens,
        socket,
        context_name,
        context_group,
        context_owner,
        device_named(device),
        min_mass,
        predictor,
        cpu_share,
        profile,
        trace,
        trace_plot,
    )
    chosen = dtype_named(dtype.value) if dtype else directory.dtype
    report = run(job, directory, chosen, progress_for_stderr(), *_listeners(as_json))
    print(json.dumps(report.as_json(), indent=2) if as_json else f"\n{report.summary()}")


@app.command("demo")
def demo_command(
    context_tokens: Annotated[int, typer.Option(min=1, help="Least length of the text.")] = 16384,
    budget: BudgetOption = None,
    min_mass: MinMassOption = None,
    resident: ResidentOption = None,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
    socket: SocketOption = None,
    context_name: ContextNameOption = None,
    context_group: ContextGroupOption = None,
    context_owner: ContextOwnerOption = None,
    predictor: PredictorOption = Predictor.auto,
    cpu_share: CpuShareOption = None,
    profile: ProfileOption = None,
    trace: TraceOption = None,
    trace_plot: TracePlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hide notes in the Python standard library's sources and ask the bundled model for four of them."""
    parsed_budget, parsed_resident = (
        _budget(budget, min_mass),
        None if resident is None else parse_bytes(resident),
    )

    check_writable(trace)
    _check_picture(trace_plot)
    from hillinfer.demo import LONGEST_ANSWER, make_demo
    from hillinfer.model_directory import ModelDirectory, bundled_model, device_named, dtype_named
    from hillinfer.progress import progress_for_stderr
    from hillinfer.run import Job, run

    directory = ModelDirectory(bundled_model())
    demo = make_demo(directory.tokenizer, context_tokens)
    if not as_json:
        print(
            f"{context_tokens:,} tokens of the standard library's sources, notes hidden in them\n", flush=True
        )
    job = Job(
        context=demo.context,
        questions=demo.questions,
        budget=parsed_budget,
        resident=parsed_resident,
        precision=precision,
        max_new_tokens=LONGEST_ANSWER,
        socket=socket,
        context_name=context_name,
        context_group=context_group,
        context_owner=context_owner,
        device=device_named(device),
        min_mass=min_mass,
        predictor=predictor,
        cpu_share=cpu_share,
        profile=profile,
        trace=trace,
        trace_plot=trace_plot,
    )
    report = run(job, directory, dtype_named("float32"), progress_for_stderr(), *_listeners(as_json))
    right = sum(task.is_right(answer.text) for task, answer in zip(demo.tasks, report.answers, strict=True))
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        print(f"\n{right} of {len(demo.tasks)} right\n\n{report.summary()}")


def _budget(budget: str | None, min_mass: float | None) -> Budget | None:
    if budget is not None and min_mass is not None:
        raise InvalidInput("--min-mass decides how many tokens are attended: give no --budget with it")
    return None if budget is None else parse_budget(budget)


def _check_picture(path: Path | None) -> None:
    if path is not None:
        from hillinfer.eval.plot import check_file

        check_file(path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot read the context {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the context {path} is not UTF-8 text") from error


def _listeners(as_json: bool) -> tuple[Callable[[Answer], None], Callable[[str], None]]:
    """Return what prints answers and what prints notes as they come; the JSON object has both."""
    return (_ignore, _ignore) if as_json else (_say, _note)


def _say(answer: Answer) -> None:
    speed = "" if answer.decode_tokens_per_s is None else f", then {answer.decode_tokens_per_s:.1f} tokens/s"
    print(
        f"Q  {answer.question}\nA  {answer.text}   [first token after {answer.ttft_s:.2f} s{speed}]",
        flush=True,
    )


def _note(line: str) -> None:
    print(f"{line}\n", flush=True)


def _ignore(_: object) -> None:
    pass
