"""Contexts: whose tokens are kept, how many each layer holds, and in which extents."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hillinfer_core.errors import (
    ContextInUse,
    DamagedCatalogue,
    DeviceUnavailable,
    InvalidInput,
    OutOfOrder,
    QuotaExceeded,
    UnknownContext,
)
from hillinfer_core.layout import TILE_TOKENS, Shape
from hillinfer_core.units import format_bytes

from .durable import Durable, append_limit, check_labels, check_name, check_shape
from .extents import Extent, ExtentAllocator
from .layers import Layer
from .placement import Placed, extend, extent_bytes, next_tokens

CHECKSUM_BYTES = 4
"""Bytes of a row's checksum: CRC-32C."""

MAX_APPEND_BYTES = 1 << 20
"""Bytes of rows of one append, unless a unit has more: others wait meanwhile (docs/performance.md)."""

MAX_SESSION_LAYERS = 1 << 16
"""Layers of all contexts that one session has open: a bound on the daemon's memory, not on what is stored."""

MAX_SESSION_CONTEXTS = 4096
"""Contexts that one session has open: each is looked at when another is opened, and closed at the end."""

MAX_DURABLE = 4096
"""Durable contexts of one user on one drive: a bound on the catalogue, whatever they hold."""

UNLIMITED = 1 << 62
"""Bytes, or a number, that no quota reaches."""

_ids = itertools.count(1)
"""Numbers of contexts, never used twice by one daemon, whichever its drive."""


@dataclass
class Context:
    """An open context of one session.

    ``durable`` is what it writes, ``base`` what it began with; a context with neither is volatile and began
    empty. ``lost`` says why once the worker that held its keys is gone, unless it can be restored. Of one
    that is ``discarded`` only the books are left, to be closed.
    """

    context_id: int
    session_id: int
    uid: int
    shape: Shape
    layers: list[Layer]
    durable: Durable | None = None
    base: Durable | None = None
    lost: str = ""
    discarded: bool = False
    evaluation_key_bytes: int = 0

    @property
    def row_count(self) -> int:
        """Rows held: tokens of every layer times KV heads."""
        return sum(layer.tokens for layer in self.layers) * self.shape.kv_heads

    @property
    def checksum_bytes(self) -> int:
        """Bytes of row checksums in DRAM."""
        return self.row_count * CHECKSUM_BYTES

    @property
    def loaded(self) -> bool:
        """Whether the worker knows it: a durable one is loaded when it is first used."""
        return self.durable is None or self.durable.loaded

    @property
    def own_extents(self) -> list[Extent]:
        """Every extent that goes when the context is closed: none of a durable one."""
        if self.durable:
            return []
        return [placed.extent for layer in self.layers for placed in layer.own]

    @property
    def extent_bytes(self) -> int:
        """Bytes of the pool that hold its tokens, shared ones included."""
        return sum(placed.extent.length for layer in self.layers for placed in layer.placed)

    @property
    def append_limit(self) -> int:
        """Tokens that one append takes at most."""
        unit = self.shape.append_unit
        units = MAX_APPEND_BYTES // (self.shape.kv_heads * self.shape.row_bytes * unit)
        limit = max(1, units) * unit
        return min(limit, append_limit(self.shape)) if self.durable else limit

    @property
    def tails(self) -> list[int]:
        """Tokens kept aside for each layer."""
        kept = self.durable or self.base
        return kept.tails if kept else [0] * self.shape.layers

    def layer(self, index: int) -> Layer:
        """Return layer ``index``; raises :class:`InvalidInput` if the shape has no such layer."""
        if index >= len(self.layers):
            raise InvalidInput(f"layer {index} does not exist; the context has {len(self.layers)}")
        return self.layers[index]


@dataclass(frozen=True)
class Quotas:
    """Bytes of the cold pool, and kept aside, that each may take; contexts they may have open."""

    user: int = UNLIMITED
    context: int = UNLIMITED
    session: int = UNLIMITED
    session_contexts: int = UNLIMITED
    user_contexts: int = UNLIMITED


class Catalogue:
    """All contexts of one drive and their extents. Not thread-safe; nothing here blocks.

    ``quotas`` may be changed at any time: who has more keeps it, and gets nothing new.
    """

    def __init__(self, allocator: ExtentAllocator, quotas: Quotas) -> None:
        self.allocator = allocator
        self.quotas = quotas
        self._contexts: dict[int, Context] = {}
        self._durables: dict[tuple[int, str], Durable] = {}
        self._used: Counter[int] = Counter()  # bytes, by user

    @property
    def durables(self) -> list[Durable]:
        """Every durable context, by name, then user."""
        return sorted(self._durables.values(), key=lambda durable: (durable.name, durable.uid))

    def __contains__(self, context_id: int) -> bool:
        return context_id in self._contexts

    def __iter__(self) -> Iterator[Context]:
        return iter(list(self._contexts.values()))

    def restore(self, durable: Durable) -> None:
        """Take in a durable context of an earlier run; raises :class:`DamagedCatalogue` if it cannot be."""
        key = durable.uid, durable.name
        if key in self._durables:
            raise DamagedCatalogue(f"two contexts of user {durable.uid} are called {durable.name!r}")
        durable.context_id = next(_ids)
        for extent in durable.extents:
            try:
                self.allocator.claim(extent)
            except ValueError:
                raise DamagedCatalogue(
                    f"context {durable.name!r} of user {durable.uid} has an extent at {extent.offset} "
                    "not in the pool or of another; see what can be kept with `hillinferctl fsck`"
                ) from None
        self._used[durable.uid] += durable.extent_bytes + durable.tail_bytes
        self._durables[key] = durable

    def open(self, session_id: int, uid: int, shape: Shape) -> Context:
        """Register a new, empty, volatile context; raises :class:`InvalidInput` for a shape out of range."""
        shape.validate()
        return self._register(session_id, uid, shape, [Layer() for _ in range(shape.layers)])

    def find_durable(self, uid: int, name: str) -> Durable:
        """Return a user's durable context; raises :class:`UnknownContext`."""
        durable = self._durables.get((uid, name))
        if durable is None:
            raise UnknownContext(
                f"there is no context {name!r}; `hillinferctl contexts` lists those there are"
            )
        return durable

    def open_writer(
        self, session_id: int, uid: int, name: str, shape: Shape, labels: Mapping[str, str], new: Durable
    ) -> Context:
        """Register a context that writes the durable context ``name``; ``new`` becomes it if there is none.

        Raises :class:`InvalidInput`, ``ContextMismatch``, or :class:`ContextInUse` for one that is saved or
        being written.
        """
        shape.validate()
        check_name(name)
        check_labels(labels)
        check_shape(shape)
        self._check_session(session_id, uid, shape)
        durable = self._durables.get((uid, name))
        if durable is None:
            if sum(owner == uid for owner, _ in self._durables) >= MAX_DURABLE:
                raise QuotaExceeded(f"{MAX_DURABLE} durable contexts of this user are there; delete some")
            durable = new
            durable.context_id = next(_ids)
            durable.layers = [Layer() for _ in range(shape.layers)]
            durable.tails = [0] * shape.layers
            durable.loaded = False
            self._durables[uid, name] = durable
        else:
            durable.check_matches(shape, labels)
            durable.check_writable()
            durable.check_free("cannot write")
        context = Context(durable.context_id, session_id, uid, shape, durable.layers, durable=durable)
        durable.writer = context.context_id
        self._contexts[context.context_id] = context
        return context

    def open_reader(
        self, session_id: int, uid: int, durable: Durable, shape: Shape, labels: Mapping[str, str]
    ) -> Context:
        """Register a volatile context of the user that begins with a saved one, which may be another's.

        Raises :class:`ContextMismatch`, or :class:`ContextInUse` for one not saved.
        """
        durable.check_matches(shape, labels)
        if not durable.saved:
            raise ContextInUse(f"context {durable.name!r} is not saved yet; continue it, or delete it")
        context = self._register(session_id, uid, shape, [layer.continued() for layer in durable.layers])
        context.base = durable
        durable.readers.add(context.context_id)
        return context

    def get(self, session_id: int, context_id: int) -> Context:
        """Return the session's context.

        Raises :class:`UnknownContext`, also for another session's, and :class:`DeviceUnavailable` for a
        lost one.
        """
        context = self.find(session_id, context_id)
        if context.lost:
            raise DeviceUnavailable(
                f"context {context_id} was lost {context.lost}; close it, and open and fill a new one"
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

    def mark_lost(self, why: str) -> int:
        """Note that the worker's memory is gone; return how many open contexts are lost by that.

        ``why`` continues "the context was lost".

        What a durable context holds is in the pool and in the catalogue file: it is loaded again when needed.
        """
        for durable in self._durables.values():
            durable.loaded = False
        gone = [context for context in self._contexts.values() if not context.durable]
        for context in gone:
            context.lost = context.lost or why
        return len(gone)

    def reserve(self, context: Context, layer_index: int, first_token: int, tokens: int) -> list[Placed]:
        """Check an append and allocate the extents it needs beyond those the layer has (may be none).

        Raises :class:`OutOfOrder`, :class:`InvalidInput`, :class:`QuotaExceeded` or ``PoolFull``, with
        nothing changed. Follow with :meth:`commit` or :meth:`rollback`.
        """
        layer, shape = context.layer(layer_index), context.shape
        if context.durable:
            context.durable.check_writable()
        if first_token != layer.tokens:
            raise OutOfOrder(
                f"layer {layer_index} holds {layer.tokens} tokens; append cannot start at {first_token}"
            )
        if tokens == 0 or tokens % shape.append_unit:
            raise InvalidInput(f"append takes multiples of {shape.append_unit} tokens, not {tokens}")
        if tokens > context.append_limit:
            raise InvalidInput(f"append takes at most {context.append_limit} tokens, not {tokens}")
        aside = context.durable.tails[layer_index] if context.durable else 0  # goes when they come
        self._check_quotas(context, layer, first_token + tokens, aside)
        placed = extend(self.allocator, shape, layer.covered, first_token + tokens)
        self._used[context.uid] += sum(item.extent.length for item in placed)
        return placed

    def commit(self, context: Context, layer_index: int, tokens: int, placed: list[Placed]) -> None:
        """Account an append that the worker has carried out."""
        layer = context.layers[layer_index]
        layer.placed.extend(placed)
        layer.tokens += tokens

    def check_tail(self, context: Context, durable: Durable, layer_index: int, tokens: int) -> None:
        """Raise :class:`QuotaExceeded` if there is no room to keep ``tokens`` of a layer aside."""
        more = tokens - durable.tails[layer_index]
        self._check_room(context, more * context.shape.kv_heads * context.shape.row_bytes)

    def set_tail(self, durable: Durable, layer_index: int, tokens: int) -> None:
        """Account the tokens of a layer that are kept aside."""
        more = tokens - durable.tails[layer_index]
        self._used[durable.uid] += more * durable.shape.kv_heads * durable.shape.row_bytes
        durable.tails[layer_index] = tokens

    def rollback(self, context: Context, placed: list[Placed]) -> None:
        """Free what :meth:`reserve` allocated."""
        self._free(context.uid, [item.extent for item in placed])

    def close(self, context: Context) -> None:
        """Forget the context; free its extents unless they belong to a durable context."""
        del self._contexts[context.context_id]
        if context.durable:
            context.durable.writer = 0
        if context.base:
            context.base.readers.discard(context.context_id)
        self._free(context.uid, context.own_extents)

    def delete(self, durable: Durable) -> None:
        """Forget a durable context that nobody has open, and free its extents."""
        del self._durables[durable.uid, durable.name]
        self._used[durable.uid] -= durable.tail_bytes
        self._free(durable.uid, durable.extents)

    def _check_session(self, session_id: int, uid: int, shape: Shape) -> None:
        mine = self.of_session(session_id)
        users = sum(context.uid == uid for context in self._contexts.values())
        for what, count, limit in (
            ("session", len(mine), self.quotas.session_contexts),
            ("user", users, self.quotas.user_contexts),
        ):
            if count >= limit:
                raise QuotaExceeded(
                    f"this {what} has {count} contexts open and may have {limit}; close some, or raise "
                    f"{what}_context_limit"
                )
        if len(mine) >= MAX_SESSION_CONTEXTS:
            raise QuotaExceeded(
                f"this session has {len(mine)} contexts open; more are not allowed, close some"
            )
        layers = shape.layers + sum(context.shape.layers for context in mine)
        if layers > MAX_SESSION_LAYERS:
            raise QuotaExceeded(
                f"the open contexts of this session would have {layers} layers; at most "
                f"{MAX_SESSION_LAYERS} are allowed, close some"
            )

    def _register(self, session_id: int, uid: int, shape: Shape, layers: list[Layer]) -> Context:
        self._check_session(session_id, uid, shape)
        context = Context(next(_ids), session_id, uid, shape, layers)
        self._contexts[context.context_id] = context
        return context

    def _check_quotas(self, context: Context, layer: Layer, needed: int, aside: int) -> None:
        new, covered = 0, layer.covered
        while covered < needed:
            tokens = next_tokens(covered)
            new += extent_bytes(context.shape, tokens)
            covered += tokens
        if new:
            self._check_room(context, new - aside * context.shape.kv_heads * context.shape.row_bytes)

    def _check_room(self, context: Context, new: int) -> None:
        if new <= 0:
            return
        for what, used, limit in (
            ("context", _own_bytes(context), self.quotas.context),
            ("session", self._session_bytes(context.session_id), self.quotas.session),
            ("user", self._used[context.uid], self.quotas.user),
        ):
            if used + new > limit:
                raise QuotaExceeded(
                    f"this {what} has {format_bytes(used)} of the cold pool, and kept aside, and may have "
                    f"{format_bytes(limit)}; close or delete contexts, or raise {what}_quota"
                )

    def _session_bytes(self, session_id: int) -> int:
        if self.quotas.session == UNLIMITED:
            return 0
        return sum(_own_bytes(context) for context in self.of_session(session_id))

    def _free(self, uid: int, extents: list[Extent]) -> None:
        for extent in extents:
            self.allocator.free(extent)
            self._used[uid] -= extent.length


def _own_bytes(context: Context) -> int:
    aside = context.durable.tail_bytes if context.durable else 0
    return aside + sum(placed.extent.length for layer in context.layers for placed in layer.own)


def key_bytes(shape: Shape, tokens: int) -> int:
    """Return the bytes of the evaluation keys of ``tokens`` tokens (a multiple of 16) of one layer."""
    return tokens // TILE_TOKENS * shape.kv_heads * shape.key_tile_bytes
