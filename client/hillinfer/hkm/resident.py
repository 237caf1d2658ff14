"""How the `resident` budget is divided, and what is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transformers.cache_utils import DynamicSlidingWindowLayer

from hillinfer.split.ranking import SplitRanking
from hillinfer_core.errors import ResidentTooSmall
from hillinfer_core.layout import TILE_TOKENS
from hillinfer_core.units import format_bytes

if TYPE_CHECKING:
    from hillinfer.context import Context
    from hillinfer.hkm.layer import HierarchicalLayer
    from hillinfer.hkm.slots import Slots
    from hillinfer.pipeline.prefetch import Pipeline

_MIRROR_SHARE = 2  # of what slots leave, mirrored keys get at most one part in so many: our choice
_CHECKSUM_BYTES = 4  # of a token and KV head, in the daemon
_ID_BYTES = 4  # of a row in memory
_HOT_STEP = 16  # rows by which a hot pool grows or shrinks, so that it is not resized at every step


@dataclass(frozen=True)
class Division:
    """What the rest of the budget buys.

    keep_slots: whether selected tokens stay in their slots between steps; if
        not, a layer's selection lives only while that layer computes.
    fits: whether one layer's selection does at all; if not, everything is attended to, a block at a time.
    hot_rows: rows of the hot pool, for each layer, sequence and KV head.
    """

    keep_slots: bool
    hot_rows: int
    fits: bool = True


def divide(
    limit: int, fixed: int, slot_bytes: int, layer_bytes: int, row_bytes: int, streams: int
) -> Division:
    """Divide `limit` bytes: first what must be held, then slots, then hot pool.

    fixed: evaluation keys, checksums, arena, tail buffers, pinned slots;
    slot_bytes: the selected tokens' slots of all layers, and the hit counters
    that come with keeping them; layer_bytes: the slots of one layer; row_bytes: one row with its id;
    streams: layers x sequences x KV heads.
    Raises ResidentTooSmall when `fixed` alone does not fit.
    """
    left = limit - fixed
    if left < 0:
        raise ResidentTooSmall(
            f"this context needs {format_bytes(fixed)} for evaluation keys, checksums, buffers and windows, "
            f"but resident is {format_bytes(limit)}; raise resident, or use INT4 evaluation keys"
        )
    if slot_bytes > left:
        return Division(keep_slots=False, hot_rows=0, fits=layer_bytes <= left)
    return Division(keep_slots=True, hot_rows=(left - slot_bytes) // (row_bytes * streams))


@dataclass
class Tally:
    """What decode steps selected, and how much was held at most."""

    selected: int = 0
    brought: int = 0
    resident_peak: int = 0
    resident_at_peak: dict[str, int] = field(default_factory=dict)


class Resident:
    """Memory of one cache: what its layers may hold of `limit` bytes, and what is held. Not thread-safe.

    sliding: the layers that keep a window of transformers'; full_layers: those kept in the cold pool.
    contexts: of each sequence, the cache's own list.
    """

    def __init__(
        self,
        limit: int,
        arena_bytes: int,
        sliding: Sequence[DynamicSlidingWindowLayer],
        full_layers: Sequence[HierarchicalLayer],
        contexts: Sequence[Context],
        pipeline: Pipeline,
    ) -> None:
        self.tally = Tally()
        self._limit = limit
        self._arena_bytes = arena_bytes
        self._full_layers = full_layers
        self._sliding = sliding
        self._contexts = contexts
        self._pipeline = pipeline

    def make_room(self, tokens: int) -> None:
        """Shrink what all layers hold to what is left once each sequence has `tokens` more."""
        layers = [layer for layer in self._full_layers if layer.is_initialized]
        division = self.divide(layers[0].slots, sum(layer.slots.selected for layer in layers), tokens)
        for layer in layers:
            layer.make_room(division)

    def divide(self, slots: Slots, selected: int, coming: int = 0) -> Division:
        """Divide the limit for a step in which layers select `selected` tokens together, slots like `slots`.

        coming: tokens that each sequence is about to have more. Each layer asks in each step.
        Raises ResidentTooSmall as the function `divide` does.
        """
        contexts, pipeline, shape = self._contexts, self._pipeline, self._contexts[0].shape
        layers = len(self._full_layers)
        streams = layers * len(contexts) * shape.kv_heads
        row_bytes = shape.row_bytes
        fixed = slots.pinned * row_bytes * streams + self._apart_from_layers(contexts)
        if coming:
            tiles = -(-coming // TILE_TOKENS) + 1
            fixed += tiles * (shape.key_tile_bytes + TILE_TOKENS * _CHECKSUM_BYTES) * streams
        tokens = max(slots.lengths.tolist()) + coming
        hits = 2 * (tokens * 9 // 8 + 64) * streams
        row = row_bytes + _ID_BYTES
        a_layers_rows = selected * row * streams // layers**2
        # What is prefetched waits beside the slots of all.
        prefetch = a_layers_rows * pipeline.most_waiting - pipeline.nbytes
        slot_bytes = selected * row * streams // layers + hits + max(0, prefetch)
        if isinstance(pipeline.policy, SplitRanking):
            left = self._limit - fixed - slot_bytes
            fixed += pipeline.policy.reserve(left // _MIRROR_SHARE, contexts)
        room = divide(self._limit, fixed, slot_bytes, a_layers_rows, row, streams)
        return Division(room.keep_slots, min(room.hot_rows, tokens) // _HOT_STEP * _HOT_STEP, room.fits)

    def held(self, also: Sequence[Context] = ()) -> dict[str, int]:
        """Bytes held now, by kind, client and daemon together, those of the contexts `also` included."""
        contexts = [*self._contexts, *also]
        layers = [layer for layer in self._full_layers if layer.is_initialized]
        kinds = {
            "slots": sum(layer.slots.nbytes for layer in layers),
            "hot_pool": sum(layer.hot.nbytes for layer in layers),
            "evaluation_keys": sum(context.evaluation_key_bytes for context in contexts),
            "checksums": sum(context.checksum_bytes for context in contexts),
            "buffers": self._arena_bytes
            + self._pipeline.nbytes
            + sum(context.tail_bytes for context in contexts),
        }
        if self._sliding:
            kinds["sliding_windows"] = self._sliding_bytes()
        if isinstance(self._pipeline.policy, SplitRanking):
            kinds["mirrored_keys"] = self._pipeline.policy.held_bytes(contexts)
        return kinds

    def account(self, also: Sequence[Context] = ()) -> None:
        """Note what is held now, if it is more than ever before; `also` as for `held`."""
        # Each layer does this in each step: only what is to be kept is listed by kind.
        contexts = [*self._contexts, *also] if also else self._contexts
        total = self._apart_from_layers(contexts)
        for layer in self._full_layers:
            if layer.is_initialized:
                total += layer.slots.nbytes + layer.hot.nbytes
        if isinstance(self._pipeline.policy, SplitRanking):
            total += self._pipeline.policy.held_bytes(contexts)
        if total > self.tally.resident_peak:
            self.tally.resident_peak, self.tally.resident_at_peak = total, self.held(also)

    def _apart_from_layers(self, contexts: Sequence[Context]) -> int:
        """Bytes of evaluation keys, checksums, buffers and sliding windows."""
        total = self._arena_bytes + self._pipeline.nbytes
        if self._sliding:
            total += self._sliding_bytes()
        for context in contexts:
            total += context.evaluation_key_bytes + context.checksum_bytes + context.tail_bytes
        return total

    def _sliding_bytes(self) -> int:
        windows = (part for layer in self._sliding for part in (layer.keys, layer.values))
        return sum(part.nbytes for part in windows if part is not None)
