"""Contexts: whose tokens are kept, how many each layer holds, and in which extents."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from hillinfer_core.errors import DeviceUnavailable, InvalidInput, MemoryLimit, OutOfOrder, UnknownContext
from hillinfer_core.layout import TILE_TOKENS, Shape
from hillinfer_core.units import format_bytes

from .extents import Extent, ExtentAllocator
from .placement import Placed, extend

CHECKSUM_BYTES = 4
"""Bytes of a row's checksum: CRC-32C."""


@dataclass
class Layer:
    """One layer's tokens and the extents that hold them, ascending by token."""

    tokens: int = 0
    placed: list[Placed] = field(default_factory=list)

    @property
    def covered(self) -> int:
        """Tokens that fit in the extents the layer already has."""
        return self.placed[-1].end_token if self.placed else 0


@dataclass
class Context:
    """A volatile context of one session. ``lost`` once the worker that held its keys has died."""

    context_id: int
    session_id: int
    shape: Shape
    layers: list[Layer]
    lost: bool = False

    @property
    def row_count(self) -> int:
        """Rows held: tokens of every layer times KV heads."""
        return sum(layer.tokens for layer in self.layers) * self.shape.kv_heads

    @property
    def evaluation_key_bytes(self) -> int:
        """Bytes of evaluation keys in DRAM."""
        return self.row_count // TILE_TOKENS * self.shape.key_tile_bytes

    @property
    def checksum_bytes(self) -> int:
        """Bytes of row checksums in DRAM."""
        return self.row_count * CHECKSUM_BYTES

    @property
    def extents(self) -> list[Extent]:
        """Every extent of every layer."""
        return [placed.extent for layer in self.layers for placed in layer.placed]

    def layer(self, index: int) -> Layer:
        """Return layer ``index``; raises :class:`InvalidInput` if the shape has no such layer."""
        if index >= len(self.layers):
            raise InvalidInput(f"layer {index} does not exist; the context has {len(self.layers)}")
        return self.layers[index]


class Catalogue:
    """All open contexts and their extents. Not thread-safe; nothing here blocks."""

    def __init__(self, allocator: ExtentAllocator, evaluation_key_limit: int) -> None:
        self.allocator = allocator
        self.evaluation_key_limit = evaluation_key_limit
        self.evaluation_key_bytes = 0
        self._contexts: dict[int, Context] = {}
        self._ids = itertools.count(1)

    def open(self, session_id: int, shape: Shape) -> Context:
        """Register a new, empty context; raises :class:`InvalidInput` for a shape out of range."""
        shape.validate()
        context = Context(next(self._ids), session_id, shape, [Layer() for _ in range(shape.layers)])
        self._contexts[context.context_id] = context
        return context

    def get(self, session_id: int, context_id: int) -> Context:
        """Return the session's context.

        Raises :class:`UnknownContext`, also for another session's, and :class:`DeviceUnavailable` for a
        lost one.
        """
        context = self.find(session_id, context_id)
        if context.lost:
            raise DeviceUnavailable(
                f"context {context_id} was lost with the device worker; close it, and open and fill a new one"
            )
        return context

    def find(self, session_id: int, context_id: int) -> Context:
        """Return the session's context even if it is lost; raises :class:`UnknownContext`."""
        context = self._contexts.get(context_id)
        if context is None or context.session_id != session_id:
            raise UnknownContext(f"context {context_id} is not an open context of this session")
        return context

    def of_session(self, session_id: int) -> list[Context]:
        """Return the contexts of a session, oldest first."""
        return [context for context in self._contexts.values() if context.session_id == session_id]

    def mark_lost(self) -> int:
        """Mark every context lost, because the worker's memory is gone; return how many are open."""
        for context in self._contexts.values():
            context.lost = True
        self.evaluation_key_bytes = 0
        return len(self._contexts)

    def reserve(self, context: Context, layer_index: int, first_token: int, tokens: int) -> list[Placed]:
        """Check an append and allocate the extents it needs beyond those the layer has (may be none).

        Raises :class:`OutOfOrder`, :class:`InvalidInput`, :class:`MemoryLimit` or :class:`PoolFull`, with
        nothing changed. Follow with :meth:`commit` or :meth:`rollback`.
        """
        layer, shape = context.layer(layer_index), context.shape
        if first_token != layer.tokens:
            raise OutOfOrder(
                f"layer {layer_index} holds {layer.tokens} tokens; append cannot start at {first_token}"
            )
        if tokens == 0 or tokens % shape.append_unit:
            raise InvalidInput(f"append takes multiples of {shape.append_unit} tokens, not {tokens}")
        keys = tokens // TILE_TOKENS * shape.kv_heads * shape.key_tile_bytes
        if self.evaluation_key_bytes + keys > self.evaluation_key_limit:
            raise MemoryLimit(
                f"evaluation keys hold {format_bytes(self.evaluation_key_bytes)} of "
                f"{format_bytes(self.evaluation_key_limit)}; close contexts, use int4, "
                "or raise evaluation_keys_dram"
            )
        return extend(self.allocator, shape, layer.covered, first_token + tokens)

    def commit(self, context: Context, layer_index: int, tokens: int, placed: list[Placed]) -> None:
        """Account an append that the worker has carried out."""
        layer, before = context.layers[layer_index], context.evaluation_key_bytes
        layer.placed.extend(placed)
        layer.tokens += tokens
        # The worker may have died between its answer and this call.
        if not context.lost:
            self.evaluation_key_bytes += context.evaluation_key_bytes - before

    def rollback(self, placed: list[Placed]) -> None:
        """Free what :meth:`reserve` allocated."""
        for item in placed:
            self.allocator.free(item.extent)

    def close(self, context: Context) -> None:
        """Forget the context and free its extents."""
        del self._contexts[context.context_id]
        if not context.lost:
            self.evaluation_key_bytes -= context.evaluation_key_bytes
        for extent in context.extents:
            self.allocator.free(extent)
