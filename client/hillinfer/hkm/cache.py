"""The transformers cache of HKM: layers, contexts, and what they hold together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from hillinfer.context import Context
from hillinfer.hkm.coverage import kept_layers
from hillinfer.hkm.guarantee import Guarantee
from hillinfer.hkm.layer import HierarchicalLayer
from hillinfer.hkm.padding import Padding
from hillinfer.hkm.policy import ColdPoolRanking, SelectionPolicy
from hillinfer.hkm.query import ExactQuery, QueryPredictor
from hillinfer.hkm.resident import Division, Resident
from hillinfer.hkm.slots import Slots
from hillinfer.hkm.tensors import row_dtype
from hillinfer.pinned import RECENT, SINKS
from hillinfer.pipeline.choice import Predictor
from hillinfer.pipeline.prefetch import Pipeline
from hillinfer.session import Session
from hillinfer.split.ranking import CpuShare, SplitRanking
from hillinfer_core.errors import (
    BudgetTooSmall,
    ContextMismatch,
    HillInferError,
    InvalidInput,
    UnknownContext,
    UnsupportedModel,
)
from hillinfer_core.layout import Precision, Shape
from hillinfer_core.units import Budget

Observer = Callable[["HierarchicalCache", int, torch.Tensor, float], None]
"""Sees the cache, the layer, its queries [B, H, n, D] and their scaling after every attended step."""


@dataclass(frozen=True)
class HkmConfig:
    """What an application asks of HKM.

    budget: tokens attended for each decode step and KV head, sinks and recent
        window included; min_mass: attend to as many as hold this share of the
        attention (0 to 1) of every query head, and not to a budget; resident:
        bytes held in memory, client and daemon together; sinks, recent: pinned
        tokens (recent is raised to the append unit of the rows where that is larger);
        predictor: the query that ranks them, see `Predictor`; without effect under min_mass;
        cpu_share: of the tokens, ranked by the CPU beside the drive, see `SplitRanking`; None for none;
        least: tokens that a per cent means at least.
    """

    budget: Budget
    resident: int
    precision: Precision
    sinks: int = SINKS
    recent: int = RECENT
    min_mass: float | None = None
    predictor: Predictor = Predictor.exact
    cpu_share: CpuShare | None = None
    least: int = 0

    def __post_init__(self) -> None:
        if self.sinks < 1 or self.recent < 1:
            raise InvalidInput("sinks and recent must be at least 1")
        if self.min_mass is not None:
            if not 0 < self.min_mass <= 1:
                raise InvalidInput(f"min_mass is a share of the attention, above 0 to 1, not {self.min_mass}")
            return
        tokens = self.budget.tokens
        if tokens is not None and tokens < self.sinks + self.recent:
            raise BudgetTooSmall(
                f"a budget of {tokens} tokens is below the {self.sinks} sinks and {self.recent} recent "
                f"tokens that are always attended: ask for at least {self.sinks + self.recent}, or pin fewer"
            )


class HierarchicalCache(Cache):
    """KV cache of one batch of sequences, one context of the daemon for each. Not thread-safe.

    Freed by `close` or when garbage-collected.

    durable: the name under which `save` will keep the one sequence; base: the
    name of a saved one to begin with, as if the model had just read it (blocks;
    raises UnknownContext, ContextMismatch). `owner`, `labels` as in `Session.open_context`.
    """

    def __init__(
        self,
        session: Session,
        model_config: PretrainedConfig,
        config: HkmConfig,
        policy: SelectionPolicy | None = None,
        predictor: QueryPredictor | None = None,
        *,
        durable: str | None = None,
        base: str | None = None,
        owner: str | int | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.session = session
        self.config = config
        self.predictor = predictor or ExactQuery()
        self.contexts: list[Context] = []
        self.observer: Observer | None = None
        """For measurements, and policies that follow the attention; None costs nothing."""
        self.block_tokens = 0
        self.full_layers: list[HierarchicalLayer] = []
        super().__init__(layers=[self._layer(layer) for layer in kept_layers(model_config)])
        self._sliding = [each for each in self.layers if isinstance(each, DynamicSlidingWindowLayer)]
        self.padding = Padding()
        own = ColdPoolRanking() if config.cpu_share is None else SplitRanking.with_share(config.cpu_share)
        self.pipeline = Pipeline(session, policy or own, config.predictor, len(self.full_layers))
        self._resident = Resident(
            config.resident,
            session.arena_bytes,
            self._sliding,
            self.full_layers,
            self.contexts,
            self.pipeline,
        )
        self.tally = self._resident.tally
        self.guarantee = None if config.min_mass is None else Guarantee(self, config.min_mass)
        self._named = durable is not None or base is not None
        self._durable = durable
        self._base = base
        self._owner = owner
        self._labels = labels
        if self._named and self._sliding:
            raise UnsupportedModel(
                "the model has sliding-window layers, whose KV is not in the cold pool: its contexts cannot "
                "be kept under a name"
            )
        self._usable = True
        self._finalizer = weakref.finalize(self, _close_all, self.pipeline, self.contexts)
        if base is not None:
            self._begin_with(base)

    @property
    def policy(self) -> SelectionPolicy:
        """Which tokens are selected; may be set between steps."""
        return self.pipeline.policy

    @policy.setter
    def policy(self, policy: SelectionPolicy) -> None:
        self.pipeline.drop()
        self.pipeline.policy = policy

    def _begin_with(self, name: str) -> None:
        saved = self.session.find_context(name, self._owner)
        if saved is None:
            raise UnknownContext(f"there is no context named {name!r}: hillinferctl contexts lists them")
        # Heads and dtype are the stored ones until the model's first step shows its own, see `open_contexts`.
        shape = replace(saved.shape, layers=len(self.full_layers), precision=self.config.precision)
        self._add_context(self.session.open_context(shape, base=name, owner=self._owner, labels=self._labels))
        for layer in self.full_layers:
            layer.begin_with(self.contexts[0].length(layer.index))

    def save(self, group: str | int | None = None) -> None:
        """Keep what the cache holds under its `durable` name, complete and read-only, and go on after it.

        What is appended from here on belongs to this cache alone; it goes on
        exactly as one that begins with the name does. Blocks. Raises
        InvalidInput for a cache without a name, and for one that holds padding. `group` as in `Context.save`.
        """
        self.check_whole()
        if self._durable is None or not self.contexts:
            raise InvalidInput(
                "there is nothing to save: begin with new_cache(durable=NAME), and run the model"
            )
        self.pipeline.drop()
        writer = self.contexts[0]
        for layer in self.full_layers:
            layer.append_window()
        if any(writer.length(layer.index) != layer.get_seq_length() for layer in self.full_layers):
            raise InvalidInput("a context with padding cannot be saved: give the text without any")
        writer.save(group)
        self.contexts[0] = self.session.open_context(writer.shape, base=self._durable, labels=self._labels)
        self._base, self._durable = self._durable, None
        writer.close()
        for layer in self.full_layers:
            layer.forget_selection()

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back: drop the last `-tokens_to_remove` columns of every sequence.

        A positive number is the length to keep, as in earlier versions of
        transformers. Blocks. Cheap for tokens that wait in the recent window:
        those of assisted generation do. Deeper, the cold pool being
        append-only, what is kept is copied into a new context, block by block;
        for a moment the daemon holds both.

        Raises InvalidInput for a `durable` cache that is not saved yet, and
        beyond what sliding-window layers recorded; PoolFull and MemoryLimit
        when there is no room for the copy. The cache is as it was after these.
        """
        self.check_whole()
        self.pipeline.background.settle()
        self.pipeline.drop()
        held = self.get_seq_length()
        keep = min(tokens_to_remove, held) if tokens_to_remove > 0 else max(held + tokens_to_remove, 0)
        removed = held - keep
        for layer in self._sliding:
            _check_croppable(layer, removed)
        shorter = self._shortened(keep) if removed else {}
        self.account(list(shorter.values()))
        try:
            for row, context in shorter.items():
                old, self.contexts[row] = self.contexts[row], context
                old.close()
            for layer in self._sliding:
                if removed or layer.record_past:
                    layer.crop(-removed)
            for full in self.full_layers if removed else ():
                full.crop(-removed)
            self.padding.crop(keep)
        except BaseException:
            self.fail()
            raise

    def _shortened(self, columns: int) -> dict[int, Context]:
        """Return new contexts for the sequences whose old ones hold more than `columns` columns."""
        with ExitStack() as opened:
            contexts = {}
            for row, old in enumerate(self.contexts):
                tokens = self.padding.tokens(row, columns)
                if any(old.length(layer.index) > tokens for layer in self.full_layers):
                    contexts[row] = opened.enter_context(self._copied(old, tokens))
            opened.pop_all()
        return contexts

    def _copied(self, old: Context, tokens: int) -> Context:
        """Return a new context with the first `tokens` tokens of `old`, on its base if that is no longer."""
        if self._durable is not None:
            raise InvalidInput(
                f"{self._durable} is not saved yet and cannot be rolled back: save() first, "
                "or begin with new_cache() without a name"
            )
        new, base = None, self._base
        if base is not None:
            new = self.session.open_context(old.shape, base=base, owner=self._owner, labels=self._labels)
            if new.length(0) > tokens:
                new.close()
                new, self._base = None, None
        new = new or self.session.open_context(old.shape)
        try:
            for layer in range(old.shape.layers):
                for start in range(new.length(layer), tokens, self.block_tokens):
                    rows = old.fetch_range(layer, start, min(self.block_tokens, tokens - start))
                    new.append(layer, rows[:, :, 0], rows[:, :, 1])
        except BaseException:
            self._base = base
            with suppress(HillInferError):
                new.close()
            raise
        return new

    def check_usable(self) -> None:
        """Raise InvalidInput once the cache is closed, or a step failed half-way through the layers."""
        if not self._usable:
            raise InvalidInput("this cache is closed, or a step of it failed: begin with new_cache()")

    def check_whole(self, *, in_step: bool = False) -> None:
        """As `check_usable`, and fail the cache if the layers hold different tokens.

        in_step: the first of `full_layers` has begun; sliding ones before it have the tokens already.
        """
        self.check_usable()
        sliding = () if in_step else self._sliding
        if len({layer.get_seq_length() for layer in (*sliding, *self.full_layers)}) > 1:
            self.fail()
            raise InvalidInput(
                "a step of this cache ended between two layers, which hold different tokens now: begin with "
                "new_cache()"
            )

    def reset(self) -> None:
        """Not supported, as the others here: said before any layer is touched."""
        self.full_layers[0].reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Not supported."""
        self.full_layers[0].reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not supported."""
        self.full_layers[0].batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Not supported."""
        self.full_layers[0].batch_select_indices(indices)

    def fail(self) -> None:
        """Refuse every further step."""
        self._usable = False

    def _layer(self, layer: CacheLayerMixin) -> CacheLayerMixin:
        if isinstance(layer, DynamicSlidingWindowLayer):
            return layer  # bounded already: stays as it is
        self.full_layers.append(HierarchicalLayer(self, len(self.full_layers)))
        return self.full_layers[-1]

    def open_contexts(
        self, batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> Sequence[Context]:
        """Open one context for each sequence, once; later calls check that the layers are alike."""
        shape = Shape(len(self.full_layers), kv_heads, head_dim, row_dtype(dtype), self.config.precision)
        if self._named and batch != 1:
            raise InvalidInput(f"a context with a name holds one sequence, not a batch of {batch}")
        if self.contexts and (self.contexts[0].shape != shape or len(self.contexts) != batch):
            held = self.contexts[0].shape
            if not any(layer.is_initialized for layer in self.full_layers):
                raise ContextMismatch(f"the saved context holds {held}, the model makes {shape}")
            raise UnsupportedModel(f"layers of different shapes are not supported: {held}, {shape}")
        while len(self.contexts) < batch:
            self._add_context(self._open_empty(shape))
        return self.contexts

    def _open_empty(self, shape: Shape) -> Context:
        context = self.session.open_context(shape, durable=self._durable, labels=self._labels)
        if any(context.length(layer) for layer in range(shape.layers)):
            context.close()
            raise InvalidInput(
                f"{self._durable} was begun but never saved, and holds a part of its text: "
                "delete it (Session.delete_context), or choose another name"
            )
        return context

    def _add_context(self, context: Context) -> None:
        self.contexts.append(context)
        shape = context.shape
        per_token = shape.kv_heads * shape.row_bytes
        self.block_tokens = max(shape.append_unit, min(2048, self.session.arena_bytes // 2 // per_token))

    def selection_size(self, tokens: int, slots: Slots) -> int:
        """Tokens to select by rank in a sequence of `tokens`, besides the pinned ones."""
        budget = max(self.config.budget.of(tokens), self.config.least)
        return max(0, min(budget, tokens) - slots.pinned)

    def divide(self, slots: Slots, selected: int) -> Division:
        """Divide the resident budget for a step that selects `selected` tokens (see `Resident.divide`)."""
        # Each layer may append before the next one is asked how much there is room for.
        coming = self.contexts[0].append_unit
        return self._resident.divide(slots, selected * len(self.full_layers), coming)

    def divide_among(self, slots: Slots, selected: int) -> Division:
        """Divide it for a step in which layers select `selected` tokens together, slots like `slots`."""
        return self._resident.divide(slots, selected)

    def make_room(self, tokens: int) -> None:
        """Shrink what all layers hold to what is left once each sequence has `tokens` more. Blocks."""
        self.pipeline.drop()  # what is asked for counts on the pools as they are
        self._resident.make_room(tokens)

    def resident(self, also: Sequence[Context] = ()) -> dict[str, int]:
        """Bytes held now (see `Resident.held`)."""
        return self._resident.held(also)

    def account(self, also: Sequence[Context] = ()) -> None:
        """Note what is held now, if it is more than ever before (see `Resident.account`)."""
        self._resident.account(also)

    def full_bytes(self) -> int:
        """Bytes of the whole KV of the cold layers, had it been kept in memory."""
        if not self.contexts:
            return 0
        shape = self.contexts[0].shape
        per_token = shape.layers * shape.kv_heads * shape.row_bytes
        columns = self.full_layers[0].get_seq_length()
        return per_token * sum(self.padding.tokens(row, columns) for row in range(len(self.contexts)))

    def count_selected(self, selected: int, brought: int) -> None:
        """Note that of `selected` tokens `brought` came from the cold pool."""
        self.tally.selected += selected
        self.tally.brought += brought

    def close(self) -> None:
        """Free the contexts and everything held; idempotent."""
        self._usable = False
        self._finalizer()
        for layer in self.full_layers:
            layer.release()


def _check_croppable(layer: DynamicSlidingWindowLayer, removed: int) -> None:
    """Raise InvalidInput unless the layer holds the window as it was `removed` columns ago."""
    before = layer.get_seq_length() - removed
    held = 0 if layer.keys is None else layer.keys.shape[-2]
    if removed and held < removed + min(layer.sliding_window - 1, before):
        raise InvalidInput(
            f"sliding-window layers have forgotten what came before the last {removed} tokens: call "
            "activate_past_recording() on the cache before the steps that may be rolled back"
        )


def _close_all(pipeline: Pipeline, contexts: list[Context]) -> None:
    pipeline.close()
    if isinstance(pipeline.policy, SplitRanking):
        pipeline.policy.forget(contexts)
    while contexts:
        # A session or a daemon that is gone has freed its contexts already.
        with suppress(HillInferError):
            contexts.pop().close()
