"""What is asked for a decode step of a layer, in the step or ahead of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hillinfer.hkm.tensors import to_storage
from hillinfer.pipeline.device import Uploaded
from hillinfer.session import Brought, EvaluateItem

if TYPE_CHECKING:
    from hillinfer.hkm.layer import HierarchicalLayer

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Prefetched:
    """What a job brought: for each of `rows` of the batch a selection, and its KV rows on the device.

    uploaded: None where they are on the host only. brought: None where the policy attends to nothing more.
    began, asked, ended: seconds of `perf_counter`; what was appended first was until `asked`.
    """

    rows: list[int]
    brought: list[Brought] | None
    uploaded: Sequence[Uploaded | None]
    began: float
    asked: float
    ended: float


class Answer(Protocol):
    """Of a job that is under way. Used by the thread of the model."""

    def result(self) -> Prefetched:
        """Wait for it. Raises what there was to be raised."""
        ...

    def come(self) -> Sequence[Brought]:
        """Return what has come so far and waits for its layer."""
        ...

    def is_kept(self) -> bool:
        """Whether it came because something else had to wait for it, and is kept for its layer."""
        ...

    def drop(self) -> None:
        """Wait until nothing of it is under way. Raises what there was to be raised."""
        ...


class Amounts(NamedTuple):
    """How much a decode step brings, which is the same in every layer; the lists have one for each sequence.

    wanted: tokens to select; ends: one past the last token to rank; append: up to where tokens go to the
    context first. slots, hot_rows: to make room for before.
    """

    wanted: list[int]
    ends: list[int]
    append: list[int]
    slots: int
    hot_rows: int


@dataclass
class Job:
    """What is to be brought for the next decode step of a layer.

    lengths: tokens of each sequence before that step; the answer is good for no other. held: uint32
    [B, Hkv, S], of slots and hot pool, which stay as they are until then.
    """

    layer: HierarchicalLayer
    step: int
    lengths: list[int]
    amounts: Amounts
    held: Ids
    sampled: bool
    ahead: bool
    """Whether it was made in that step, and not at the end of the one before."""
    first: bool
    """Whether the slots were empty, so that every row is brought: it says little of the steps after it."""
    own: torch.Tensor | None = None
    """The query [B, H, 1, D], if it is meant to be the layer's own: the answer is good for no other, but for
    rounding."""
    began: float = 0.0
    waited: float | None = None
    """When the thread of the model began to wait for it, if that was before the layer took it."""
    answer: Answer | None = None

    @property
    def appends(self) -> bool:
        """Whether there is anything to append first."""
        layer, contexts = self.layer, self.layer.cache.contexts
        return any(end > contexts[row].length(layer.index) for row, end in enumerate(self.amounts.append))

    def append_ahead(self) -> None:
        """Append what the step would append itself. Blocks."""
        layer, contexts = self.layer, self.layer.cache.contexts
        for row, end in enumerate(self.amounts.append):
            layer.append_pinned(row, contexts[row], end)

    def items(self, query: F32) -> tuple[list[int], list[EvaluateItem]]:
        """See `items`."""
        return items(self.layer, query, self.amounts.wanted, self.amounts.ends, self.held)


class Jobs:
    """Makes the jobs of one cache. What those of a step have in common is worked out once."""

    def __init__(self) -> None:
        self._latest: dict[bool, tuple[list[int], Amounts | None]] = {}
        """Of steps in progress, and of those after them: the lengths, and how much is brought then."""

    def forget(self) -> None:
        """Work it out anew: the contexts or the policy are others, or what is held is."""
        self._latest.clear()

    def make(self, layer: HierarchicalLayer, step: int, sampled: bool, *, ahead: bool) -> Job | None:
        """Make room for the next decode step of `layer` and return its job; None where it asks nothing.

        ahead: the step is the one in progress, and what waits in the recent window may be
        appended for it; else the token that leaves the window in that step is not ranked.
        """
        slots = layer.slots
        if layer.cache.guarantee is not None:
            return None
        lengths, (before, amounts) = slots.lengths.tolist(), self._latest.get(ahead, (None, None))
        if lengths != before:
            amounts = _amounts(layer, lengths, ahead)
            self._latest[ahead] = lengths, amounts
        if amounts is None:
            return None
        first = not slots.selected
        slots.resize(amounts.slots)
        layer.hot.resize(amounts.hot_rows)
        return Job(layer, step, lengths, amounts, held(layer), sampled, ahead, first)


def _amounts(layer: HierarchicalLayer, lengths: list[int], ahead: bool) -> Amounts | None:
    """Return how much the next decode step brings; None where nothing is to be asked for it.

    Any layer says the same of a step: as the budget is divided, each has room for what it is about to append.
    """
    slots, cache = layer.slots, layer.cache
    sizes = [cache.selection_size(n + 1, slots) for n in lengths]
    most = max(sizes)
    ends = [n + ahead - slots.recent for n in lengths]
    wanted = [max(min(k, end - slots.sinks), 0) for k, end in zip(sizes, ends, strict=True)]
    if not max(wanted):
        return None
    if not ahead and sizes == [max(n + 1 - slots.pinned, 0) for n in lengths]:
        return None
    division = cache.divide(slots, most)
    if not division.keep_slots:
        return None
    append = []
    if ahead:
        waiting = layer.waiting
        append = [
            min(layer.append_end(context, n + 1, waiting), n)
            for context, n in zip(cache.contexts, lengths, strict=True)
        ]
    return Amounts(wanted, ends, append, most, division.hot_rows)


def append_for_next(layer: HierarchicalLayer) -> bool:
    """Begin to append what the next decode step of `layer` would, and wait for; say if anything is sent.

    What comes of it the layer's next `Job` sees, which appends what was not.
    """
    slots, index, any_sent = layer.slots, layer.index, False
    for row, (context, length) in enumerate(zip(layer.cache.contexts, slots.lengths.tolist(), strict=True)):
        first = context.length(index)
        end = min(layer.append_end(context, length + 1, layer.waiting), length)
        if end > first:
            keys, values = slots.pinned_rows(row, first, end - first)
            any_sent |= context.append_ahead(index, to_storage(keys), to_storage(values))
    return any_sent


def held(layer: HierarchicalLayer) -> Ids:
    """Return the ids whose rows slots and hot pool hold, uint32 [B, Hkv, S]."""
    return np.concatenate([layer.slots.ids, layer.hot.ids], axis=-1)


def items(
    layer: HierarchicalLayer, query: F32, wanted: Sequence[int], ends: Sequence[int], held: Ids
) -> tuple[list[int], list[EvaluateItem]]:
    """Return the rows of the batch that select by rank, and what to ask the policy for them.

    query: [B, H, D]; wanted: tokens of each row to select; ends: one past the last to rank.
    """
    rows = [row for row, k in enumerate(wanted) if k]
    contexts, sinks = layer.cache.contexts, layer.slots.sinks
    return rows, [
        EvaluateItem(contexts[row], query[row], wanted[row], sinks, ends[row], held[row]) for row in rows
    ]
