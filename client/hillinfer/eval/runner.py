"""Evaluates prompts: each context is read once, and every policy begins where the reading ended.

The KV of sliding-window layers is not in the cold pool: a model with such reads again for each policy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from hillinfer.attachment import attach
from hillinfer.eval.conversation import Conversation
from hillinfer.eval.findings import Answer, Findings
from hillinfer.eval.job import GUARANTEED, EvalJob, MassTarget
from hillinfer.eval.metrics import Attended, Ranked, SelectionMetrics
from hillinfer.eval.prompts import Prompt, make_prompt
from hillinfer.hkm.cache import HierarchicalCache, HkmConfig
from hillinfer.hkm.coverage import kept_layers
from hillinfer.model_directory import ModelDirectory
from hillinfer.pinned import pinned_within
from hillinfer.pipeline.timeline import Span
from hillinfer.policies import POLICIES
from hillinfer.policies.base import Reading
from hillinfer.policies.next_layer import NextLayerQuery
from hillinfer.policies.reading import Reader
from hillinfer.prefill import chunks
from hillinfer.private_daemon import PrivateDaemon
from hillinfer.session import Session
from hillinfer_core.errors import UnsupportedModel
from hillinfer_core.units import Budget

_NAME = "evaluated"  # of the durable context that holds the prompt in work
_EVERYTHING = Budget(alpha=1.0)


@dataclass(frozen=True)
class Setting:
    """The model, and where and in what dtype it runs."""

    directory: ModelDirectory
    dtype: torch.dtype
    device: str = "cpu"


@contextmanager
def prompt_runner(job: EvalJob, setting: Setting) -> Iterator[PromptRunner]:
    """Load the model and start a private daemon for prompts to be evaluated with.

    Blocks. Raises UnreadableModel, DaemonUnavailable and what `attach` raises.
    """
    with (
        tempfile.TemporaryDirectory(prefix="hillinfer-eval-") as pool,
        PrivateDaemon(pool_dir=Path(pool)) as daemon,
        Session.connect(daemon.socket, name="hillinfer eval") as session,
        # For the attention alone: each policy has a cache of its own configuration.
        attach(
            setting.directory.load(setting.dtype, setting.device), session=session, predictor=job.predictor
        ) as attachment,
        torch.inference_mode(),
    ):
        yield PromptRunner(job, setting, session, attachment.model)


Amount = Budget | MassTarget


def _runs(job: EvalJob) -> list[tuple[str, Amount]]:
    """The policies with their budgets; full attention has only one."""
    runs: list[tuple[str, Amount]] = []
    for policy in job.policies:
        runs += [(policy, budget) for budget in ([_EVERYTHING] if policy == "full" else job.budgets)]
        if policy == GUARANTEED:
            runs += [(policy, MassTarget(share)) for share in job.min_mass]
    return runs


class PromptRunner:
    """Evaluates prompts one at a time. Made by `prompt_runner`; not thread-safe."""

    def __init__(self, job: EvalJob, setting: Setting, session: Session, model: Any) -> None:
        self._job, self._directory, self._dtype = job, setting.directory, setting.dtype
        self._session, self._model = session, model
        self._text_config = model.config.get_text_config(decoder=True)
        self._sliding = any(
            isinstance(layer, DynamicSlidingWindowLayer) for layer in kept_layers(self._text_config)
        )
        self._ids = torch.empty(1, 0, dtype=torch.long)  # [1, n], of the context in work
        self._found = Findings()

    def run(self, tokens: int, number: int) -> Findings:
        """Read context `number` of `tokens` tokens, and go through all policies. Blocks."""
        job, self._found = self._job, Findings()
        task = job.tasks[number % len(job.tasks)]
        prompt = make_prompt(
            task, self._directory.tokenizer, tokens, job.turns, f"{job.seed} {tokens} {number}"
        )
        ids = self._directory.tokenizer(prompt.context, return_tensors="pt").input_ids
        self._ids = ids.to(self._model.device)
        reading = self._read()
        for policy, budget in _runs(job):
            self._ask(policy, budget, tokens, number, prompt, reading)
            if job.perplexity_tokens:
                self._continue(policy, budget, tokens, prompt, reading)
        if not self._sliding:
            self._session.delete_context(_NAME)
        return self._found

    def _config(self, amount: Amount, tokens: int) -> HkmConfig:
        # Generous: the selected rows stay in slots, and memory is not what is measured.
        resident = (32 << 20) + self._directory.row_bytes(self._dtype) * tokens // 2
        resident += self._directory.window_bytes(self._dtype)
        if isinstance(amount, MassTarget):
            # Some layers need most of their tokens.
            return HkmConfig(_EVERYTHING, 3 * resident, self._job.precision, min_mass=amount.share)
        pinned = pinned_within(amount.of(tokens), self._directory.append_unit(self._dtype))
        return HkmConfig(amount, resident, self._job.precision, *pinned)

    def _read(self) -> Reading:
        """Read the context, and save it as `_NAME` where that can be."""
        tokens = self._ids.shape[1]
        reader = Reader(tokens, any(POLICIES[policy].needs_mass for policy in self._job.policies))
        cache = HierarchicalCache(
            self._session,
            self._text_config,
            self._config(_EVERYTHING, tokens),
            durable=None if self._sliding else _NAME,
        )
        cache.observer = reader.observe
        self._feed(cache)
        if not self._sliding:
            cache.save()
        cache.close()
        return reader.reading

    def _feed(self, cache: HierarchicalCache) -> None:
        for part in chunks(self._ids.shape[1]):
            self._model(input_ids=self._ids[:, part], past_key_values=cache, logits_to_keep=1)

    def _ask(
        self, name: str, budget: Amount, tokens: int, number: int, prompt: Prompt, reading: Reading
    ) -> None:
        with ExitStack() as stack:
            conversation, attended = self._begin(stack, name, budget, tokens, reading, self._job.metrics)
            for turn, question in enumerate(prompt.questions, start=1):
                score = question.score(conversation.ask(question, self._job.max_new_tokens))
                self._found.answers.append(
                    Answer(
                        name, prompt.task, tokens, str(budget), turn, number, score, attended.take(),
                        prompt.fingerprint,
                    )
                )  # fmt: skip

    def _continue(self, name: str, budget: Amount, tokens: int, prompt: Prompt, reading: Reading) -> None:
        """Feed the text after the context token by token; the first prediction is exact, and left out."""
        ids = self._directory.tokenizer(prompt.continuation, add_special_tokens=False)["input_ids"]
        ids = ids[: self._job.perplexity_tokens + 1]
        losses = self._found.losses.setdefault((name, tokens, str(budget)), [])
        with ExitStack() as stack:
            conversation, _ = self._begin(stack, name, budget, tokens, reading, metrics=False)
            for token, following in pairwise(ids):
                logits = conversation.feed([token])
                losses.append(-float(torch.log_softmax(logits.float(), -1)[following]))

    def _begin(
        self, stack: ExitStack, name: str, budget: Amount, tokens: int, reading: Reading, metrics: bool
    ) -> tuple[Conversation, Attended]:
        """Return a conversation that begins after the context, and what counts its attended tokens."""
        policy = stack.enter_context(POLICIES[name](self._model, reading))
        config = policy.config(self._config(budget, reading.tokens))
        if name == GUARANTEED:
            config = replace(config, predictor=self._job.predictor)
        base = None if self._sliding else _NAME
        cache = HierarchicalCache(
            self._session, self._text_config, config, policy, policy.predictor, base=base
        )
        stack.callback(cache.close)
        if self._sliding:
            self._feed(cache)
            for layer in cache.full_layers:
                layer.append_window()  # as in a saved context: policies copy their keys from the pool
        if cache.guarantee is not None:
            guarantee = cache.guarantee
            told = self._found.mass.setdefault((name, tokens, str(budget)), [])
            stack.callback(lambda: told.append(guarantee.report()))
        if name == GUARANTEED and cache.guarantee is None:
            spans: list[Span] = []
            cache.pipeline.timeline.spans = spans
            ranked = self._found.ranked.setdefault((name, tokens, str(budget)), Ranked())
            stack.callback(lambda: ranked.add(spans))
        attended = Attended()
        observers = [attended.observe, policy.observe]
        if metrics:
            layers = self._found.metrics.setdefault((name, tokens, str(budget)), {})
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
