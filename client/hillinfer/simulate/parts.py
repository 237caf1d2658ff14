"""What a decode step of this machine is made of, each part measured alone and fitted to nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from hillinfer.bench.selections import step
from hillinfer.evaluation import EvaluateItem
from hillinfer.hkm.cache import HierarchicalCache
from hillinfer.hkm.decode import attend, bring
from hillinfer.hkm.layer import HierarchicalLayer
from hillinfer.hkm.policy import ColdPoolRanking
from hillinfer.pipeline.query import decoder_layers
from hillinfer.session import Brought, Session

Ids = npt.NDArray[np.uint32]

_FEW_TOKENS = 64


class Between:
    """Works between the layers of a model, as a step does: neither finds what it left in the caches."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._work: Callable[[int], None] | None = None
        self._worked_s = 0.0
        self._hooks = [
            layer.register_forward_pre_hook(self._hook(number), prepend=True)
            for number, layer in enumerate(decoder_layers(model))
        ]

    def step(self, cache: Any, token: torch.Tensor, work: Callable[[int], None]) -> float:
        """Return the seconds of a step of `token` without those of `work`, done before each layer. Blocks."""
        self._work, self._worked_s = work, 0.0
        began = perf_counter()
        step(self._model, cache, token)
        seconds = perf_counter() - began - self._worked_s
        self._work = None
        return seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, number: int) -> Callable[..., None]:
        def before(*_: Any) -> None:
            if self._work is not None:
                began = perf_counter()
                self._work(number)
                self._worked_s += perf_counter() - began

        return before


class Times:
    """Seconds by kind, of each layer in turn. Layers differ, and some take long: a step is their sum."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._seconds: dict[str, list[float]] = {}

    def add(self, kind: str, seconds: float) -> None:
        """Count what one layer took."""
        self._seconds.setdefault(kind, []).append(seconds)

    def of_step(self, kind: str) -> float:
        """Return the seconds of all layers: the median of the steps."""
        seconds, layers = self._seconds[kind], self._layers
        return median(sum(seconds[at : at + layers]) for at in range(0, len(seconds), layers))

    def forget(self) -> None:
        """Count nothing of what there was so far."""
        self._seconds.clear()


@dataclass(frozen=True)
class Asking:
    """Seconds of a step's questions to the daemon: turns, tokens ranked, ids selected, rows brought."""

    turn: float
    tokens: float
    selected: float
    rows: float


class Questions(ColdPoolRanking):
    """Ranks as HillInfer does, and notes what is asked."""

    def __init__(self) -> None:
        self.latest: dict[int, EvaluateItem] = {}
        """By layer."""

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        """See `SelectionPolicy.select`; of one sequence."""
        (self.latest[layer],) = items
        return super().select(session, layer, items)


class AskingTimer:
    """Times questions that the steps put, again and each time with less in them."""

    def __init__(self, session: Session, questions: Questions, layers: int) -> None:
        self._session, self._questions = session, questions
        self._selected: dict[int, Ids] = {}
        self.times = Times(layers)
        self.kinds: Sequence[Callable[[int], None]] = (self.whole, self.kept, self.one, self.few)
        """In this order; each asks about a layer, and notes how long that took."""

    def whole(self, layer: int) -> None:
        """Ask the same."""
        self._selected[layer] = self._ask("whole", layer, self._questions.latest[layer]).copy()

    def kept(self, layer: int) -> None:
        """Ask the same, with the rows of all winners held."""
        item = self._questions.latest[layer]
        held = np.concatenate([item.held, self._selected[layer]], axis=1)
        self._ask("kept", layer, item._replace(held=held))

    def one(self, layer: int) -> None:
        """Rank as many tokens for one winner, which is held or is not."""
        self._ask("one", layer, self._questions.latest[layer]._replace(k=1))

    def few(self, layer: int) -> None:
        """Rank a few tokens for one winner."""
        item = self._questions.latest[layer]
        self._ask("few", layer, item._replace(k=1, end=min(item.end, item.first + _FEW_TOKENS)))

    def _ask(self, kind: str, layer: int, item: EvaluateItem) -> Ids:
        began = perf_counter()
        (brought,) = self._session.evaluate_and_bring(layer, [item])
        self.times.add(kind, perf_counter() - began)
        return brought.ids

    def result(self) -> Asking:
        """Return the parts of a step's questions; those that vanish in the noise are 0."""
        few, one, kept, whole = map(self.times.of_step, ("few", "one", "kept", "whole"))
        return Asking(few, max(0.0, one - few), max(0.0, kept - one), max(0.0, whole - kept))


class SelectingTimer:
    """Times what a selection costs a layer besides its answer: dividing memory, asking, placing, attending.

    A cache replays the selections of the steps that are predicted, a step behind them; whoever answers does
    it at once, and is not counted. nothing: a cache of which nothing is ranked.
    """

    def __init__(self, cache: HierarchicalCache, nothing: HierarchicalCache, query: torch.Tensor) -> None:
        self._cache, self._nothing, self._query = cache, nothing, query
        self._answers = _Answers()
        cache.policy = self._answers
        self.times = Times(len(cache.full_layers))
        self.kinds: Sequence[Callable[[int], None]] = (self.of_nothing, self.of_selection)
        """Each selects for a layer, and notes how long that took."""

    def follow(self, cache: HierarchicalCache) -> None:
        """Have the next selections be those that `cache` made in its latest step."""
        for mine, theirs in zip(self._cache.full_layers, cache.full_layers, strict=True):
            if not mine.is_initialized:
                like = theirs.slots.keys[:, :, :1]
                mine.lazy_initialization(like, like)
            mine.slots.lengths[:] = theirs.slots.lengths
            self._answers.ids[mine.index] = np.sort(theirs.slots.ids[0], axis=1)

    def of_nothing(self, layer: int) -> None:
        """Select nothing."""
        self._select("nothing", self._nothing.full_layers[layer])

    def of_selection(self, layer: int) -> None:
        """Select what is to be followed."""
        self._select("selection", self._cache.full_layers[layer])

    def _select(self, kind: str, layer: HierarchicalLayer) -> None:
        self._answers.spent_s = 0.0
        began = perf_counter()
        bring(layer, self._query, 1.0)
        attend(layer, self._query, 1.0)
        layer.pools.settle()
        layer.cache.account()
        self.times.add(kind, perf_counter() - began - self._answers.spent_s)

    def result(self) -> float:
        """Seconds of a step's layers, less those of selecting nothing; 0 where that vanishes in the noise."""
        return max(0.0, self.times.of_step("selection") - self.times.of_step("nothing"))


class _Answers:
    """A `SelectionPolicy` that answers for the daemon, with `ids` uint32 [kv_heads, k] for each layer."""

    def __init__(self) -> None:
        self.ids: dict[int, Ids] = {}
        self.spent_s = 0.0

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought]:
        began = perf_counter()
        (item,), ids, shape = items, self.ids[layer], items[0].context.shape
        missing = [int((~np.isin(wanted, item.held[head])).sum()) for head, wanted in enumerate(ids)]
        rows = np.ones((sum(missing), 2, shape.head_dim), shape.dtype.storage)
        self.spent_s += perf_counter() - began
        return [Brought(ids, missing, rows, 0, 0, 0)]
