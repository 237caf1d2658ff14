"""The command `hillinfer eval`. Only wiring."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hillinfer.options import DeviceOption, PredictorOption
from hillinfer.pipeline.choice import Predictor
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Precision
from hillinfer_core.units import parse_budget

if TYPE_CHECKING:
    from hillinfer.eval.findings import Findings

DTYPES = ("float32", "bfloat16", "float16")
PERPLEXITY_TOKENS = 64


def eval_command(
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="A local transformers model directory.", show_default="the bundled one"
        ),
    ] = None,
    context_tokens: Annotated[
        list[int], typer.Option(min=256, help="Length of the texts; repeat it for more.")
    ] = [  # noqa: B006 - Typer takes it, nobody changes it
        4096
    ],
    budget: Annotated[
        list[str],
        typer.Option(
            help="Tokens attended in each step: a per cent of the past, or a count; repeat it for more."
        ),
    ] = ["2%"],  # noqa: B006 - Typer takes it, nobody changes it
    min_mass: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE",
            help="Ask hillinfer also for this share of the attention instead of a budget, for example 0.95: "
            "proven with --precision int8, estimated with int4; repeat it for more.",
        ),
    ] = None,
    policies: Annotated[
        str,
        typer.Option(
            help="Comma-separated: full, hillinfer, recent, h2o, quest, abstracts, next_layer, "
            "previous_step, oracle."
        ),
    ] = "full,hillinfer,recent",
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated: single, multi_key, multi_value, chain1, chain2, chain3, long. The bundled "
            "model cannot do multi_value."
        ),
    ] = "single,multi_key,chain1",
    prompts: Annotated[
        int, typer.Option(min=1, help="Texts for each length, dealt to the tasks in turn.")
    ] = 100,
    turns: Annotated[int, typer.Option(min=1, help="Questions asked in turn on each text.")] = 1,
    seed: Annotated[int, typer.Option(help="Another seed, other prompts.")] = 0,
    precision: Annotated[
        Precision, typer.Option(help="Of the evaluation keys of hillinfer.")
    ] = Precision.int4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 24,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of weights and KV: float32, bfloat16, float16.",
            show_default="the model's; bundled: float32",
        ),
    ] = None,
    device: DeviceOption = "auto",
    predictor: PredictorOption = Predictor.auto,
    processes: Annotated[
        int, typer.Option(min=1, help="Work on that many texts at once, each with a model of its own.")
    ] = 1,
    metrics: Annotated[
        bool,
        typer.Option("--metrics", help="Measure selections too: recall, captured mass, overlap, cosine."),
    ] = False,
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="Measure perplexity on the text after each context too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw accuracy over budgets, .png or .svg.")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write every answer as a line of JSON, for hillinfer eval-report."),
    ] = None,
) -> None:
    """Compare policies on generated tasks: what selecting a few tokens costs in right answers.

    Every policy gets the same texts and questions. Reading and questions are exact, each later step attends
    to the budget; a private daemon holds the KV. The text is the Python standard library's sources.
    """
    budgets = tuple(parse_budget(each) for each in budget)
    if dtype not in (None, *DTYPES):
        raise InvalidInput(f"no such dtype: {dtype}; there are {', '.join(DTYPES)}")

    from hillinfer.eval.evaluate import evaluate
    from hillinfer.eval.findings import AnswersFile
    from hillinfer.eval.job import EvalJob
    from hillinfer.eval.report import as_markdown
    from hillinfer.eval.runner import Setting
    from hillinfer.model_directory import ModelDirectory, bundled_model, device_named, dtype_named
    from hillinfer.progress import progress_for_stderr

    if plot is not None:
        from hillinfer.eval.plot import check_file

        check_file(plot)  # before the work, not after it
    job = EvalJob(
        policies=_names(policies),
        context_tokens=tuple(dict.fromkeys(context_tokens)),
        budgets=tuple(dict.fromkeys(budgets)),
        tasks=_names(tasks),
        prompts=prompts,
        turns=turns,
        seed=seed,
        precision=precision,
        max_new_tokens=max_new_tokens,
        metrics=metrics,
        perplexity_tokens=PERPLEXITY_TOKENS if perplexity else 0,
        min_mass=tuple(dict.fromkeys(min_mass or ())),
        predictor=predictor,
    )
    directory = ModelDirectory(model or bundled_model())
    named = dtype or ("float32" if model is None else None)
    setting = Setting(directory, dtype_named(named) if named else directory.dtype, device_named(device))
    with ExitStack() as stack:
        note: Callable[[Findings], None] = _nothing
        if answers is not None:
            file = AnswersFile(answers)
            stack.callback(file.close)
            note = file.write
        result = evaluate(job, setting, progress_for_stderr(), processes, note)
    if plot is not None:
        from hillinfer.eval.plot import draw

        draw(result, plot)
    if as_json:
        print(json.dumps(result.as_json(), indent=2))
    elif markdown:
        print(as_markdown(result))
    else:
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(as_markdown(result)))


def _nothing(_: Findings) -> None:
    pass


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def report_command(
    answers: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Written by hillinfer eval --answers.")
    ],
    against: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Compare with these answers to the same prompts; repeat it for more."
        ),
    ] = None,
    policy: Annotated[str, typer.Option(help="That is compared, with --against.")] = "hillinfer",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw accuracy over budgets, .png or .svg.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Put the answers of several evaluations together: of other lengths or seeds, or of interrupted runs.

    With --against, how much more of the answers were right than in other evaluations of the same prompts that
    differ in an option, such as --precision, with the 95 % interval.
    """
    from dataclasses import asdict

    from hillinfer.eval.findings import cells, distinct, read_answers
    from hillinfer.eval.job import Result
    from hillinfer.eval.paired import compare_files, differences
    from hillinfer.eval.report import answer_tables, difference_table

    read = [answer for path in answers for answer in read_answers(path)]
    mine = distinct(read)
    if len(mine) < len(read):
        print(f"{len(read) - len(mine)} answers came again to the same questions: left out", file=sys.stderr)
    result = Result("", 0, "", "", cells(mine))
    if against:
        theirs = distinct(answer for path in against for answer in read_answers(path))
        result.differences = compare_files(policy, _joined(answers), mine, _joined(against), theirs)
        if not result.differences:
            raise InvalidInput(f"the files have no prompts in common that {policy} answered")
    else:
        result.differences = differences(mine)
    if plot is not None:
        from hillinfer.eval.plot import check_file, draw

        check_file(plot)
        draw(result, plot)
    if as_json:
        told = {name: [asdict(each) for each in getattr(result, name)] for name in ("cells", "differences")}
        print(json.dumps(told, indent=2))
        return
    tables = [] if against else answer_tables(result.cells)
    print("\n".join([*tables, *(difference_table(result.differences) if result.differences else ())]))


def _joined(paths: list[Path]) -> str:
    return " and ".join(path.stem for path in paths)
