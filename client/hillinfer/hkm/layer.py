"""One attention layer of a hierarchical cache: what `update` and attention do with its KV."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from hillinfer.hkm.attention import Part, attend_part, join
from hillinfer.hkm.decode import decode
from hillinfer.hkm.hot_pool import HotPool
from hillinfer.hkm.pools import Pools
from hillinfer.hkm.resident import Division
from hillinfer.hkm.slots import Slots
from hillinfer.hkm.tensors import to_rows, to_storage
from hillinfer_core.errors import InvalidInput, UnsupportedModel

if TYPE_CHECKING:
    from hillinfer.context import Context
    from hillinfer.hkm.background import Background
    from hillinfer.hkm.cache import HierarchicalCache
    from hillinfer.pipeline.measure import Sample

LAYER_ATTRIBUTE = (
    "_hillinfer_layer"  # on the key tensor that `update` returns: attention finds the layer by it
)


class HierarchicalLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """KV of one layer. `update` notes the new tokens; `attend`, which knows query and mask, does the work.

    Blocking: `attend` waits for the daemon. Not thread-safe, like the model around it.
    """

    is_sliding = False
    is_croppable = True

    # Only from the layer's first tokens to `release`. Plain attributes: a decode step reads them often.
    pools: Pools
    """Slots and hot pool together."""
    slots: Slots
    """The attended KV."""
    hot: HotPool
    cache: HierarchicalCache
    """The cache that the layer belongs to."""

    def __init__(self, cache: HierarchicalCache, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index  # among the layers kept in the cold pool
        # Not a cycle: a cache that nobody refers to must free its contexts at once.
        self.cache = weakref.proxy(cache)
        self._seen = 0  # columns so far, padding included
        self.attended_all = False
        """Whether the latest decode step streamed every token instead of filling slots."""
        self.keeps_slots = True
        """Whether the slots of the step in progress stay as they are after it."""
        self._pending = False  # between `update` and `attend`
        self.softcap: float | None = None
        self.sample: Sample | None = None  # of the step in progress, where it is sampled
        """Of the scores, as the model last said."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Open the contexts of the batch and allocate the pinned slots."""
        if key_states.shape != value_states.shape:
            raise UnsupportedModel("keys and values of different head dimensions are not supported")
        batch, kv_heads, _, head_dim = key_states.shape
        config = self.cache.config
        contexts = self.cache.open_contexts(batch, kv_heads, head_dim, key_states.dtype)
        recent = max(config.recent, contexts[0].append_unit)
        self.slots = Slots(batch, kv_heads, head_dim, config.sinks, recent, key_states)
        self.hot = HotPool(batch, kv_heads, head_dim, to_storage(key_states[:0]).dtype)
        self.pools = Pools(self.slots, self.hot)
        for row, context in enumerate(contexts):
            self._fill_pinned(row, context, key_states)
        # Last: what is interrupted before begins anew.
        self.is_initialized = True

    def begin_with(self, tokens: int) -> None:
        """Count the tokens that the context holds before the model's first step."""
        self._seen = tokens

    def _fill_pinned(self, row: int, context: Context, like: torch.Tensor) -> None:
        """Put sinks and recent window where they would be, had this cache seen the context's tokens."""
        slots, held = self.slots, context.length(self.index)
        sinks = min(slots.sinks, held)
        window = min(slots.recent, held - sinks)
        for first, count in ((0, sinks), (held - window, window)):
            kv = to_rows(context.fetch_range(self.index, first, count), like)
            slots.lengths[row] = first
            slots.append(row, kv[:, :, 0], kv[:, :, 1])

    def forget_selection(self) -> None:
        """Empty the slots of selected tokens and the hot pool."""
        self.slots.resize(0)
        self.hot.resize(0)

    def release(self) -> None:
        """Drop what the pools hold; the layer cannot be used again."""
        if self.is_initialized:
            del self.pools, self.slots, self.hot
        self.is_initialized = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the new KV [B, Hkv, n, D] and hand it on to attention unchanged."""
        if self.index:
            self.cache.check_usable()
        else:
            # An interruption or an error outside of attention, in a layer before, has told the cache nothing.
            self.cache.check_whole(in_step=True)
        if self._pending:
            self.cache.fail()
            raise UnsupportedModel("the model changes the keys after the cache: attention never saw them")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._pending = True
        self._seen += key_states.shape[2]
        for states in (key_states, value_states):
            setattr(states, LAYER_ATTRIBUTE, self)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical mask size: (columns, offset)."""
        return self._seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search is not supported."""
        raise UnsupportedModel(
            "beam search needs to reorder the KV cache, which is not supported: use num_beams=1"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeating the sequences of a batch is not supported."""
        raise UnsupportedModel("the sequences of a KV cache cannot be repeated: use a new cache for each")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Dropping sequences of a batch is not supported."""
        raise UnsupportedModel("the sequences of a KV cache cannot be selected: use a new cache for each")

    def reset(self) -> None:
        """Emptying a cache is not supported."""
        raise UnsupportedModel("a KV cache in the cold pool cannot be emptied: begin with new_cache()")

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` columns of slots and hot pool: the layer's part of `Cache.crop`.

        Blocks: what is in the recent window again comes from the context, which
        must not hold dropped tokens any more (InvalidInput).
        """
        columns = self._seen + tokens_to_remove
        for row, context in enumerate(self.cache.contexts):
            tokens = self.cache.padding.tokens(row, columns)
            if context.length(self.index) > tokens:
                raise InvalidInput("a layer cannot be cropped alone: crop the cache")
            if self.is_initialized:
                first, count = self.slots.crop(row, tokens)
                if count:
                    kv = to_rows(context.fetch_range(self.index, first, count), self.slots.keys)
                    self.slots.refill(row, first, kv[:, :, 0], kv[:, :, 1])
                self.hot.crop(row, tokens)
        if self.is_initialized:
            self.hot.trim(int(self.slots.lengths.max()))
        self._seen = columns

    def append_window(self) -> None:
        """Append to the contexts what waits in the recent window, behind what is still on its way there."""
        self.cache.pipeline.background.settle()
        for row, context in enumerate(self.cache.contexts):
            self.append_pinned(row, context, int(self.slots.lengths[row]))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padding: torch.Tensor | None,
        scaling: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Store the new KV [B, Hkv, n, D] and attend the queries [B, H, n, D]; returns [B, H, n, D].

        padding: bool [B, columns], False for padding, or None. A step of one
        token attends within the budget; a step of several is exact. softcap:
        see `attend_part`; ranking is by the products, whose order it keeps.
        """
        self.softcap = softcap
        try:
            if not self._pending:
                raise UnsupportedModel("the model attends to the same keys more than once")
            self.sample = None
            output = self._attend(query, key, value, padding, scaling)
            if self.cache.observer is not None:
                self.cache.observer(self.cache, self.index, query, scaling)
            if not self.keeps_slots:
                self.cache.account()
                self.slots.resize(0)
                self.keeps_slots = True
            if query.shape[2] == 1:
                losses = None if self.sample is None else self.sample.losses
                self.cache.pipeline.attended(self, query, losses)
        except BaseException:
            # Some layers hold this step's tokens and some do not: going on would be wrong in silence.
            self.cache.fail()
            raise
        self._pending = False
        self.cache.account()
        return output

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padding: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        new = key.shape[2]
        visible = self.cache.padding.step(padding, self._seen, new)
        if new == 1:
            return decode(self, query, key, value, scaling)
        self.cache.pipeline.drop(self.index)
        return self._exact(query, key, value, visible, scaling)

    def _exact(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: np.ndarray[Any, np.dtype[np.bool_]] | None,
        scaling: float,
    ) -> torch.Tensor:
        output, background = torch.zeros_like(query), self.cache.pipeline.background
        if self is self.cache.full_layers[0]:
            self.cache.make_room(key.shape[2])
        for row in range(key.shape[0]):
            # Padding is never stored: nobody may attend to it, now or later.
            real = np.arange(key.shape[2]) if visible is None else np.flatnonzero(visible[row])
            columns = torch.from_numpy(real).to(key.device)
            q, k, v = (t[row].index_select(1, columns) for t in (query, key, value))
            past = self._past_blocks(row)
            new = attend_part(q, k, v, scaling, causal=True, softcap=self.softcap)
            seen = self._past_part(row, q, scaling, past)
            attended = new if seen is None else join(new, seen)
            output[row].index_copy_(1, columns, attended.output.to(query.dtype))
            if row == 0:
                background.settle()
            self.store(row, k, v, self.slots.recent, background)
        if self is self.cache.full_layers[-1] or self.hot.capacity:
            # Whoever calls the model next, and the hot pool's size, count on all of it.
            background.settle()
        return output

    def make_room(self, division: Division) -> None:
        """Hold no more than `division` leaves, which may be more than is held."""
        if not division.keep_slots:
            self.slots.resize(0)
        self.hot.resize(min(division.hot_rows, self.hot.capacity))

    def _past_blocks(self, row: int) -> Iterator[np.ndarray[Any, Any]]:
        """What the cold pool has between sinks and recent window, block by block, read ahead."""
        slots, context = self.slots, self.cache.contexts[row]
        end, block = int(slots.lengths[row]) - slots.recent, self.cache.block_tokens
        reads = [
            partial(context.fetch_range, self.index, start, min(block, end - start))
            for start in range(slots.sinks, end, block)
        ]
        return self.cache.pipeline.background.ahead(reads)

    def _past_part(
        self, row: int, query: torch.Tensor, scaling: float, blocks: Iterator[np.ndarray[Any, Any]]
    ) -> Part | None:
        """Exact attention over all that is stored, None for nothing: pinned slots, then the `blocks`."""
        if not self.slots.lengths[row]:
            return None
        keys, values = self.slots.pinned_part(row)
        part = attend_part(query, keys, values, scaling, softcap=self.softcap)
        for rows in blocks:
            kv = to_rows(rows, query)
            keys, values = kv[:, :, 0].contiguous(), kv[:, :, 1].contiguous()
            part = join(part, attend_part(query, keys, values, scaling, softcap=self.softcap))
        return part

    def store(
        self,
        row: int,
        key: torch.Tensor,
        value: torch.Tensor,
        most: int,
        background: Background | None = None,
    ) -> None:
        """Add tokens [Hkv, n, D] to the recent window, and to the context all but the last `most`.

        Those wait in the window, so `most` is at most its length: a `crop` then costs nothing. Where the
        window has room, those short of a whole append unit wait too. With a `background` the context
        has new tokens only once it is settled.
        """
        context, slots = self.cache.contexts[row], self.slots
        held = int(slots.lengths[row])
        end = self.append_end(context, held + key.shape[1], most)
        self.append_pinned(row, context, min(end, held))
        if end > held:
            new = slice(0, end - held)
            rows = partial(context.append, self.index, to_storage(key[:, new]), to_storage(value[:, new]))
            if background is None:
                rows()
            else:
                background.append(rows)
        slots.append(row, key, value)

    def store_step(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add one token [B, Hkv, 1, D] to each recent window; what cannot wait there goes to the contexts."""
        most = self.waiting
        for row, (context, held) in enumerate(
            zip(self.cache.contexts, self.slots.lengths.tolist(), strict=True)
        ):
            self.append_pinned(row, context, self.append_end(context, held + 1, most))
        self.slots.append_step(keys, values)

    def append_end(self, context: Context, tokens: int, most: int) -> int:
        """Up to where tokens are in the `context` of a sequence once that has `tokens`; see `store`."""
        # An append of less than a unit moves no bytes, but waits for whatever the session is doing.
        unit = context.append_unit
        return max((tokens - most) // unit * unit, tokens - self.slots.recent)

    def append_pinned(self, row: int, context: Context, end: int) -> bool:
        """Append tokens that wait in the recent window to the context, up to `end`; say if there were any."""
        first = context.length(self.index)
        if end <= first:
            return False
        keys, values = self.slots.pinned_rows(row, first, end - first)
        context.append(self.index, to_storage(keys), to_storage(values))
        return True

    @property
    def waiting(self) -> int:
        """Tokens that may wait in the recent window: ranking needs all before it in whole append units."""
        return self.slots.recent - self.cache.contexts[0].append_unit + 1

    def everything(self, query: torch.Tensor, scaling: float, tokens: int) -> torch.Tensor:
        """Attend to all of the past a block at a time, holding nothing; `tokens` are not pinned."""
        self.attended_all = True
        self.pools.forget()
        self.slots.resize(0)
        self.hot.resize(0)
        parts = [
            self._past_part(row, query[row], scaling, self._past_blocks(row)) for row in range(query.shape[0])
        ]
        read = tokens * self.slots.keys.shape[1]
        self.cache.count_selected(read, read)
        return torch.stack([part.output for part in parts if part is not None]).to(query.dtype)
