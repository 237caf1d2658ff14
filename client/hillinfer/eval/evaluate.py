"""An evaluation: its prompts dealt to one process or several, its findings put together."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.util import Finalize

import torch

from hillinfer.eval.findings import Findings, collect
from hillinfer.eval.job import EvalJob, Result
from hillinfer.eval.runner import PromptRunner, Setting, prompt_runner
from hillinfer.progress import Progress, silent

Prompts = list[tuple[int, int]]
"""Context tokens and number of each."""


def evaluate(
    job: EvalJob,
    setting: Setting,
    progress: Progress = silent,
    processes: int = 1,
    note: Callable[[Findings], None] = lambda found: None,
) -> Result:
    """Ask every policy the same questions about the same contexts; the same job gives the same figures.

    Reading is exact and done once for each context, which is saved in the cold
    pool of a private daemon; every policy and budget goes on from it. Each of `processes`
    has a model and a daemon of its own, and its share of the processors. `note` is called with
    what each prompt found, in order. Blocks. Raises
    InvalidInput, BudgetTooSmall, UnreadableModel, DaemonUnavailable and what `attach` raises.
    """
    job.check(setting.directory, setting.dtype)
    prompts = [(tokens, number) for tokens in job.context_tokens for number in range(job.prompts)]
    result = Result(
        setting.directory.path.resolve().name,
        job.seed,
        job.precision.value,
        str(setting.dtype).removeprefix("torch."),
    )
    found: list[Findings] = []
    finder = _here(job, setting) if processes == 1 else _elsewhere(job, setting, processes)
    with finder as find, progress("evaluating", len(prompts)) as advance:
        for each in find(prompts):
            found.append(each)
            note(each)
            advance(len(found))
    collect(result, found)
    return result


Finder = Callable[[Prompts], Iterable[Findings]]


@contextmanager
def _here(job: EvalJob, setting: Setting) -> Iterator[Finder]:
    with prompt_runner(job, setting) as runner:
        yield lambda prompts: (runner.run(*each) for each in prompts)


@contextmanager
def _elsewhere(job: EvalJob, setting: Setting, processes: int) -> Iterator[Finder]:
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    # spawn: a forked child would share gRPC's threads and the accelerator's context.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (job, setting, threads)) as executor:
        yield lambda prompts: executor.map(_run, prompts)


_runner: PromptRunner | None = None  # of a process of `_elsewhere`


def _begin(job: EvalJob, setting: Setting, threads: int) -> None:
    global _runner
    # Also for the private daemon, which inherits it.
    os.environ["HILLINFER_KERNEL_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    stack = ExitStack()
    # Children of a pool leave without atexit; the daemon and its pool are to go with them.
    Finalize(None, stack.close, exitpriority=0)
    _runner = stack.enter_context(prompt_runner(job, setting))


def _run(prompt: tuple[int, int]) -> Findings:
    assert _runner is not None
    return _runner.run(*prompt)
