"""Answering questions, one after another, about one context whose KV lives in the daemon's cold pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from hillinfer import shared_daemon
from hillinfer.attachment import Attachment, attach
from hillinfer.durable import is_text
from hillinfer.hkm.cache import HierarchicalCache
from hillinfer.kept_context import open_kept
from hillinfer.model_directory import ModelDirectory
from hillinfer.pinned import pinned_within
from hillinfer.pipeline.trace import draw_trace, write_trace
from hillinfer.prefill import chunks
from hillinfer.private_daemon import PrivateDaemon
from hillinfer.progress import Progress, silent
from hillinfer.report import Answer, KvUse, RunReport
from hillinfer.session import Session
from hillinfer.split.ranking import parse_cpu_share
from hillinfer.users import check_own_group
from hillinfer_core.errors import DaemonUnavailable, InvalidInput
from hillinfer_core.layout import Precision
from hillinfer_core.units import Budget

CLIENT_NAME = "hillinfer run"
_MEMORY = Path("/dev/shm")  # faster than the drive that a profile describes
LEAST_RESIDENT = 16 << 20
"""Bytes: the session's arena of 8 MiB, and as much again for what a short context holds."""


@dataclass(frozen=True)
class Job:
    """What to answer, and with how much.

    budget: None for what `attach` has by default, also for its least in a short context.
    resident: bytes, None for the larger of 16 MiB and a quarter of the
    context's KV, and sliding windows. socket: of a running daemon; None takes the one at the default
    place or, where none answers, a private one for the run. context_name: keep
    the context under this name, or find it there; where no daemon answers, one is
    started that programs share (`shared_daemon`). context_group: who may read it too; context_owner:
    another user whose it is. min_mass: attend to what holds
    this share of the attention, and not to a budget. precision: None for INT4, or
    INT8 with min_mass. device: where the model runs, as torch names it.
    predictor: see `Predictor`. cpu_share: as `attach` has it. profile: of a private daemon's
    drive, which then lies in memory. trace, trace_plot: files for the trace of decode steps and its picture.
    """

    context: str
    questions: Sequence[str]
    budget: Budget | None = None
    resident: int | None = None
    precision: Precision | None = None
    max_new_tokens: int = 32
    socket: Path | None = None
    context_name: str | None = None
    context_group: str | None = None
    context_owner: str | None = None
    device: str = "cpu"
    min_mass: float | None = None
    predictor: str = "auto"
    cpu_share: str | None = None
    profile: str | None = None
    trace: Path | None = None
    trace_plot: Path | None = None


def run(
    job: Job,
    directory: ModelDirectory,
    dtype: torch.dtype,
    progress: Progress = silent,
    answered: Callable[[Answer], None] = lambda answer: None,
    say: Callable[[str], None] = lambda note: None,
) -> RunReport:
    """Read the context, then ask the questions in turn; each sees the ones before it and their answers.

    An answer is one line: generation stops at the first line end after text,
    at the model's end token, or after `max_new_tokens`. Decoding is greedy.
    A context that is kept under the job's name is not read again.
    `answered` is called with each answer when it is complete, `say` with what
    there is to say about the name. Blocks. Raises InvalidInput, BudgetTooSmall,
    UnreadableModel, DaemonUnavailable, ContextMismatch, ContextInUse and what `attach` raises.
    """
    began = time.perf_counter()
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        say(line)

    context = _encode(directory, job.context.rstrip("\n") + "\n", special=True)
    questions = [_encode(directory, question, special=False) for question in job.questions]
    _check(job, directory, context.shape[1], sum(question.shape[1] for question in questions))
    pinned: tuple[int, int] | tuple[None, None] = None, None
    tokens = context.shape[1]
    if job.budget is not None and job.budget.of(tokens) < tokens:
        pinned = pinned_within(job.budget.of(tokens), directory.append_unit(dtype))
    resident = job.resident
    if resident is None:
        resident = max(LEAST_RESIDENT, directory.row_bytes(dtype) * context.shape[1] // 4)
        resident += directory.window_bytes(dtype)

    with _session(job) as session:
        model = directory.load(dtype, job.device)
        with (
            attach(
                model,
                session=session,
                budget=None if job.budget is None else str(job.budget),
                min_mass=job.min_mass,
                resident=resident,
                precision=job.precision,
                sinks=pinned[0],
                recent=pinned[1],
                predictor=job.predictor,
                cpu_share=job.cpu_share,
                trace=bool(job.trace or job.trace_plot),
            ) as attachment,
            torch.inference_mode(),
        ):
            started = time.perf_counter()
            cache, restored = _read_or_restore(model, attachment, context, job, progress, note)
            prefill_s = time.perf_counter() - started

            answers: list[Answer] = []
            past = context
            first_answer_s = 0.0
            for text, ids in zip(job.questions, questions, strict=True):
                asked = torch.cat([past, ids], dim=1)
                asking = time.perf_counter()
                with progress("answering", job.max_new_tokens) as advance:
                    answer, past = _answer(model, directory, cache, asked, text, job, advance)
                if not answers:
                    first_answer_s = asking - started + answer.ttft_s
                answers.append(answer)
                answered(answer)
            held = attachment.report()
            if job.trace:
                write_trace(job.trace, attachment.trace())
            if job.trace_plot:
                draw_trace(job.trace_plot, attachment.trace())
    return RunReport(
        model=directory.path.resolve().name,
        context_tokens=context.shape[1],
        context_name=job.context_name,
        restored=restored,
        notes=tuple(notes),
        prefill_s=prefill_s,
        time_to_first_answer_s=first_answer_s,
        total_s=time.perf_counter() - began,
        answers=tuple(answers),
        kv=KvUse(**{name: getattr(held, name) for name in KvUse.__dataclass_fields__}),
        mass=held.mass,
    )


def _read_or_restore(
    model: Any,
    attachment: Attachment,
    context: torch.Tensor,
    job: Job,
    progress: Progress,
    note: Callable[[str], None],
) -> tuple[HierarchicalCache, bool]:
    """Return a cache that holds `context` [1, n], and whether it was found under the job's name."""
    if job.context_name is None and (job.context_group or job.context_owner):
        raise InvalidInput("--context-group and --context-owner are about --context-name: give that too")
    if job.context_group is not None:
        check_own_group(job.context_group)  # now, and not when the text is read
    if job.context_name is None:
        cache = attachment.new_cache()
        _read(model, cache, context, progress)
        return cache, False
    cache, restored = open_kept(attachment, job.context_name, context, note, job.context_owner)
    if not restored:
        _read(model, cache, context, progress)
        cache.save(job.context_group)
        note(f"saved as {job.context_name}")
    return cache, restored


def _read(model: Any, cache: HierarchicalCache, context: torch.Tensor, progress: Progress) -> None:
    tokens = context.shape[1]
    with progress("reading", tokens) as advance:
        for part in chunks(tokens):
            model(input_ids=context[:, part].to(model.device), past_key_values=cache, logits_to_keep=1)
            advance(part.stop)


def _answer(
    model: Any,
    directory: ModelDirectory,
    cache: Any,
    asked: torch.Tensor,
    question: str,
    job: Job,
    advance: Callable[[int], None],
) -> tuple[Answer, torch.Tensor]:
    """Return the answer and all token ids so far [1, n], which end a line."""
    tokenizer = directory.tokenizer
    clock = _Clock(advance)
    given = asked.to(model.device)
    out = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        past_key_values=cache,
        max_new_tokens=job.max_new_tokens,
        do_sample=False,
        streamer=clock,
        stopping_criteria=[_LineEnd(tokenizer, asked.shape[1])],
    ).cpu()
    text = tokenizer.decode(out[0, asked.shape[1] :], skip_special_tokens=True)
    new = len(clock.times) - 1
    first, last = clock.times[1], clock.times[-1]
    rate = (new - 1) / (last - first) if new > 1 else None
    if not text.endswith("\n"):
        out = torch.cat([out, _encode(directory, "\n", special=False)], dim=1)
    return Answer(question, text.strip(), new, first - clock.times[0], rate), out


class _Clock(BaseStreamer):
    """Notes when generation began and when each token came."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.times = [time.perf_counter()]
        self._advance = advance
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self._advance(len(self.times) - 1)

    def end(self) -> None:
        pass


class _LineEnd(StoppingCriteria):
    """Ends an answer with its line. Judged on text: a line end may be part of a longer token."""

    def __init__(self, tokenizer: Any, prompt_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        text = self._tokenizer.decode(input_ids[0, self._prompt_tokens :])
        return torch.tensor(["\n" in text.lstrip()], device=input_ids.device)


def _encode(directory: ModelDirectory, text: str, *, special: bool) -> torch.Tensor:
    if not is_text(text):
        raise InvalidInput(f"this is no UTF-8 text: {text[:40]!a}")
    ids = directory.tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids
    assert isinstance(ids, torch.Tensor)
    return ids


def _check(job: Job, directory: ModelDirectory, context_tokens: int, question_tokens: int) -> None:
    if not job.questions or not all(question.strip() for question in job.questions):
        raise InvalidInput("ask at least one question, and none that is empty")
    if not job.context.strip():
        raise InvalidInput("the context is empty")
    if job.cpu_share is not None:
        parse_cpu_share(job.cpu_share)
    if job.max_new_tokens < 1:
        raise InvalidInput(f"max-new-tokens must be at least 1, not {job.max_new_tokens}")
    needed = context_tokens + question_tokens + len(job.questions) * (job.max_new_tokens + 1)
    if directory.positions is not None and needed > directory.positions:
        raise InvalidInput(
            f"the context has {context_tokens} tokens and needs {needed} with questions and answers, but the "
            f"model has {directory.positions} positions: shorten the context"
        )


@contextmanager
def _session(job: Job) -> Iterator[Session]:
    if job.profile is not None:
        if job.socket is not None or job.context_name is not None:
            raise InvalidInput("a profile is for a private daemon: leave out socket and context name")
        with (
            PrivateDaemon(pool_dir=_MEMORY, profile=job.profile) as daemon,
            Session.connect(daemon.socket, name=CLIENT_NAME) as session,
        ):
            yield session
        return
    if job.socket is not None:
        try:
            session = Session.connect(job.socket, name=CLIENT_NAME)
        except DaemonUnavailable as error:
            raise InvalidInput(str(error)) from error  # a mistake on the command line, not a failure
    elif job.context_name is not None:
        session = shared_daemon.connect(CLIENT_NAME)
    else:
        try:
            session = Session.connect(name=CLIENT_NAME)
        except DaemonUnavailable:
            with PrivateDaemon() as daemon, Session.connect(daemon.socket, name=CLIENT_NAME) as session:
                yield session
            return
    with session:
        yield session
