"""Runs an evaluation: each context is read once, and every policy begins where the reading ended."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hillinfer.attachment import attach
from hillinfer.eval.conversation import Conversation
from hillinfer.eval.job import Cell, EvalJob, Result
from hillinfer.eval.metrics import Attended, SelectionMetrics, Sums
from hillinfer.eval.prompts import Prompt, make_prompt
from hillinfer.hkm.cache import HierarchicalCache, HkmConfig
from hillinfer.model_directory import ModelDirectory
from hillinfer.policies import POLICIES
from hillinfer.policies.base import Reading
from hillinfer.policies.next_layer import NextLayerQuery
from hillinfer.policies.reading import Reader
from hillinfer.private_daemon import PrivateDaemon
from hillinfer.progress import Progress, silent
from hillinfer.run import PREFILL_CHUNK, RECENT, SINKS
from hillinfer.session import Session
from hillinfer_core.errors import UnsupportedModel
from hillinfer_core.units import Budget

_NAME = "evaluated"  # of the durable context that holds the prompt in work
_EVERYTHING = Budget(alpha=1.0)


def evaluate(
    job: EvalJob, directory: ModelDirectory, dtype: torch.dtype, progress: Progress = silent
) -> Result:
    """Ask every policy the same questions about the same contexts; the same job gives the same figures.

    Reading is exact and done once for each context, which is saved in the cold
    pool of a private daemon; every policy and budget goes on from it. Blocks. Raises
    InvalidInput, BudgetTooSmall, UnreadableModel, DaemonUnavailable and what `attach` raises.
    """
    job.check(directory)
    result = Result(
        directory.path.resolve().name, job.seed, job.precision.value, str(dtype).removeprefix("torch.")
    )
    total = sum(job.prompts * (1 + len(_runs(job))) for _ in job.context_tokens)
    with (
        tempfile.TemporaryDirectory(prefix="hillinfer-eval-") as pool,
        PrivateDaemon(pool_dir=Path(pool)) as daemon,
        Session.connect(daemon.socket, name="hillinfer eval") as session,
        # For the attention alone: each policy has a cache of its own configuration.
        attach(directory.load(dtype), session=session) as attachment,
        torch.inference_mode(),
        progress("evaluating", total) as advance,
    ):
        runner = _Runner(job, directory, dtype, session, attachment.model, result)
        done = 0
        for tokens in job.context_tokens:
            for number in range(job.prompts):
                for _ in runner.prompt(tokens, number):
                    done += 1
                    advance(done)
        runner.finish()
    return result


def _runs(job: EvalJob) -> list[tuple[str, Budget]]:
    """The policies with their budgets; full attention has only one."""
    return [
        (policy, budget)
        for policy in job.policies
        for budget in ([_EVERYTHING] if policy == "full" else job.budgets)
    ]


class _Runner:
    def __init__(
        self,
        job: EvalJob,
        directory: ModelDirectory,
        dtype: torch.dtype,
        session: Session,
        model: Any,
        result: Result,
    ) -> None:
        self._job, self._directory, self._dtype = job, directory, dtype
        self._session, self._model, self._result = session, model, result
        self._text_config = model.config.get_text_config(decoder=True)
        self._answers: dict[tuple[str, str, int, str, int], list[tuple[float, float | None]]] = {}
        self._metrics: dict[tuple[str, int, str], dict[int, Sums]] = {}
        self._losses: dict[tuple[str, int, str], list[float]] = {}

    def prompt(self, tokens: int, number: int) -> Iterator[None]:
        """Read one context and go through all policies; yields after each."""
        job = self._job
        task = job.tasks[number % len(job.tasks)]
        prompt = make_prompt(
            task, self._directory.tokenizer, tokens, job.turns, f"{job.seed} {tokens} {number}"
        )
        ids = self._directory.tokenizer(prompt.context, return_tensors="pt").input_ids
        reading = self._read(ids)
        yield
        for policy, budget in _runs(job):
            self._ask(policy, budget, tokens, prompt, reading)
            if job.perplexity_tokens:
                self._continue(policy, budget, tokens, prompt, reading)
            yield
        self._session.delete_context(_NAME)

    def finish(self) -> None:
        """Put the sums into the result."""
        for key, answers in self._answers.items():
            counted = [attended for _, attended in answers if attended is not None]
            self._result.cells.append(
                Cell(
                    *key,
                    accuracy=round(float(np.mean([score for score, _ in answers])), 4),
                    prompts=len(answers),
                    attended_tokens=round(float(np.mean(counted)), 1) if counted else None,
                )
            )
        for (policy, tokens, budget), layers in self._metrics.items():
            told = {"policy": policy, "context_tokens": tokens, "budget": budget}
            self._result.metrics += [
                told | {"layer": layer} | layers[layer].means() for layer in sorted(layers)
            ]
        for (policy, tokens, budget), losses in self._losses.items():
            told = {"policy": policy, "context_tokens": tokens, "budget": budget}
            perplexity = math.exp(float(np.mean(losses)))
            self._result.perplexity.append(told | {"perplexity": round(perplexity, 4), "tokens": len(losses)})

    def _config(self, budget: Budget, tokens: int) -> HkmConfig:
        # Generous: the selected rows stay in slots, and memory is not what is measured.
        resident = (32 << 20) + self._directory.row_bytes(self._dtype) * tokens // 2
        return HkmConfig(budget, resident, self._job.precision, SINKS, RECENT)

    def _read(self, ids: torch.Tensor) -> Reading:
        """Save the context `ids` [1, n] as `_NAME`."""
        tokens = ids.shape[1]
        reader = Reader(tokens, any(POLICIES[policy].needs_mass for policy in self._job.policies))
        cache = HierarchicalCache(
            self._session, self._text_config, self._config(_EVERYTHING, tokens), durable=_NAME
        )
        cache.observer = reader.observe
        first = 0
        while first < tokens:
            # A step of a single token would select; reading is exact.
            end = tokens if tokens - first <= PREFILL_CHUNK + 1 else first + PREFILL_CHUNK
            self._model(input_ids=ids[:, first:end], past_key_values=cache, logits_to_keep=1)
            first = end
        cache.save()
        cache.close()
        return reader.reading

    def _ask(self, name: str, budget: Budget, tokens: int, prompt: Prompt, reading: Reading) -> None:
        with ExitStack() as stack:
            conversation, attended = self._begin(stack, name, budget, tokens, reading, self._job.metrics)
            for turn, question in enumerate(prompt.questions, start=1):
                score = question.score(conversation.ask(question, self._job.max_new_tokens))
                key = (name, prompt.task, tokens, str(budget), turn)
                self._answers.setdefault(key, []).append((score, attended.take()))

    def _continue(self, name: str, budget: Budget, tokens: int, prompt: Prompt, reading: Reading) -> None:
        """Feed the text after the context token by token; the first prediction is exact, and left out."""
        ids = self._directory.tokenizer(prompt.continuation, add_special_tokens=False)["input_ids"]
        ids = ids[: self._job.perplexity_tokens + 1]
        losses = self._losses.setdefault((name, tokens, str(budget)), [])
        with ExitStack() as stack:
            conversation, _ = self._begin(stack, name, budget, tokens, reading, metrics=False)
            for token, following in pairwise(ids):
                logits = conversation.feed([token])
                losses.append(-float(torch.log_softmax(logits.float(), -1)[following]))

    def _begin(
        self, stack: ExitStack, name: str, budget: Budget, tokens: int, reading: Reading, metrics: bool
    ) -> tuple[Conversation, Attended]:
        """Return a conversation that begins with the saved context, and what counts its attended tokens."""
        policy = stack.enter_context(POLICIES[name](self._model, reading))
        config = policy.config(self._config(budget, reading.tokens))
        cache = HierarchicalCache(
            self._session, self._text_config, config, policy, policy.predictor, base=_NAME
        )
        stack.callback(cache.close)
        attended = Attended()
        observers = [attended.observe, policy.observe]
        if metrics:
            layers = self._metrics.setdefault((name, tokens, str(budget)), {})
            observers.append(SelectionMetrics(layers, self._predictor(stack)).observe)

        def observe(cache: HierarchicalCache, layer: int, query: torch.Tensor, scaling: float) -> None:
            for each in observers:
                each(cache, layer, query, scaling)

        cache.observer = observe
        return Conversation(self._model, self._directory.tokenizer, cache, policy.evicts), attended

    def _predictor(self, stack: ExitStack) -> NextLayerQuery | None:
        try:
            predictor = NextLayerQuery(self._model)
        except UnsupportedModel:
            return None
        stack.callback(predictor.close)
        return predictor
