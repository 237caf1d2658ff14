"""Recording which tokens decode steps select, on one context with questions that shift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hillinfer.attachment import attach
from hillinfer.demo import make_demo
from hillinfer.hkm.policy import ColdPoolRanking
from hillinfer.kv_shape import KvShape
from hillinfer.model_directory import ModelDirectory
from hillinfer.prefill import chunks
from hillinfer.private_daemon import PrivateDaemon
from hillinfer.progress import Progress, silent
from hillinfer.session import Brought, EvaluateItem, Session
from hillinfer_core.errors import InvalidInput

Ids = npt.NDArray[np.uint32]


@dataclass
class Recording:
    """What the decode steps of a run selected.

    order: for each layer and step uint32 [kv_heads, n], the past tokens of the
    highest scores, best first, n at most `depth`; the first `taken` of them were
    attended, besides `pinned` others. tokens: of the sequence, at each step. first_steps: the
    step with which each question's answer begins. brought: rows that the run itself read from
    the cold pool for its selections, with room for all in memory. row_bytes: K and V of a token and KV head.
    """

    depth: int
    pinned: int
    row_bytes: int
    context_tokens: int
    first_steps: list[int] = field(default_factory=list)
    order: dict[int, list[Ids]] = field(default_factory=dict)
    taken: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    brought: int = 0

    @property
    def steps(self) -> int:
        """Decode steps."""
        return len(self.taken)


class RecordingRanking:
    """Selects as `ColdPoolRanking` does, and notes the order of many more tokens than it takes."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        """See `SelectionPolicy.select`."""
        told, (item,) = self._recording, items
        k = min(told.depth, item.end - item.first)
        found = item.context.evaluate(layer, item.query, k, first=item.first, end=item.end)
        # Stable, so that of equal scores the lowest id comes first, as in the ranking itself.
        best = np.argsort(-found.scores.astype(np.int64), axis=1, kind="stable")
        told.order.setdefault(layer, []).append(np.take_along_axis(found.ids, best, axis=1))
        if layer == 0:
            told.taken.append(item.k)
            told.tokens.append(item.end + told.pinned - item.first)
        return ColdPoolRanking().select(session, layer, items)


def record(
    directory: ModelDirectory,
    context_tokens: int,
    budget: str,
    depth: int,
    questions: int,
    answer_tokens: int,
    progress: Progress = silent,
) -> Recording:
    """Read the demo's text and generate `answer_tokens` after each of `questions` that jump about in it.

    Reading and questions are exact; the steps of the answers but the first select. Blocks.
    Raises what `attach` raises, InvalidInput for more questions than there are.
    """
    demo = make_demo(directory.tokenizer, context_tokens, notes=2 * questions)
    if len(demo.tasks) < questions:
        raise InvalidInput(f"the text has notes for {len(demo.tasks)} questions, not {questions}")
    model = directory.load(torch.float32)
    encode = directory.tokenizer
    context = encode(demo.context, return_tensors="pt").input_ids
    recording = Recording(depth, 0, 2 * KvShape.of(directory.config).head_dim * 4, context.shape[1])
    with (
        PrivateDaemon() as daemon,
        Session.connect(daemon.socket, name="hillinfer bench") as session,
        attach(
            model,
            session=session,
            budget=budget,
            resident="1GiB",
            precision="int8",
            policy=RecordingRanking(recording),
            predictor="exact",  # others rank some steps twice
        ) as attachment,
        torch.inference_mode(),
        progress("recording", context.shape[1] + questions) as advance,
    ):
        cache = attachment.new_cache()
        for part in chunks(context.shape[1]):
            step(model, cache, context[:, part])
            advance(part.stop)
        recording.pinned = cache.full_layers[0].slots.pinned
        for number, task in enumerate(demo.tasks[:questions], start=1):
            recording.first_steps.append(recording.steps)
            token = step(
                model, cache, encode(task.question, add_special_tokens=False, return_tensors="pt").input_ids
            )
            for _ in range(answer_tokens):
                token = step(model, cache, token)
            # The question after begins a line.
            step(
                model,
                cache,
                torch.cat([token, encode("\n", add_special_tokens=False, return_tensors="pt").input_ids], 1),
            )
            advance(context.shape[1] + number)
        recording.brought = cache.tally.brought
    return recording


def step(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Feed `ids` [1, n] and return the next token [1, 1], greedily."""
    logits = model(input_ids=ids.to(model.device), past_key_values=cache, logits_to_keep=1).logits
    following: torch.Tensor = logits[:, -1].argmax(-1, keepdim=True).cpu()
    return following
