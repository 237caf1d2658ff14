"""Asking the daemon which tokens matter, and for the rows that the client lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hillinfer.wire import ALIGNMENT, Staging, number
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import PAGE, Reduction
from hillinfer_core.packed import Answer, Item, Region, Request, ask_again, pack_request
from hillinfer_core.v1 import cold_pool_pb2

if TYPE_CHECKING:
    from hillinfer.context import Context

EMPTY = 0xFFFFFFFF
"""The id in `EvaluateItem.held` that stands for no token (proto/hillinfer/v1/cold_pool.proto)."""


class EvaluateItem(NamedTuple):
    """One context's part of an evaluation of one layer."""

    context: Context
    query: npt.NDArray[np.float32]
    """float32 [query_heads, head_dim], after RoPE, not scaled; query_heads a multiple of kv_heads."""
    k: int
    """Winners per KV head; at most `end - first`."""
    first: int
    """First token to rank."""
    end: int
    """One past the last token to rank; at most the tokens flushed."""
    held: npt.NDArray[np.uint32]
    """uint32 [kv_heads, S]: ids whose rows the client holds; `EMPTY` for none."""


@dataclass(slots=True)
class Brought:
    """The winners of an `EvaluateItem`, and the rows of those that were not held."""

    ids: npt.NDArray[np.uint32]
    """uint32 [kv_heads, k], ascending in each head."""
    missing_per_head: list[int]
    """Winners not in `held`, for each KV head."""
    rows: npt.NDArray[Any]
    """storage dtype [sum(missing_per_head), 2 (K, V), head_dim]: head by head, ascending by id."""
    generation: int
    """Of the layer's evaluation keys; scores of different generations do not compare."""
    evaluated_bytes: int
    """Evaluation keys scanned."""
    read_bytes: int
    """Read from the cold pool."""
    scores: npt.NDArray[np.int32] | None = None
    """int32 [kv_heads, k], of the same order as `ids`, from `Session.rank` only."""
    scan_s: float = 0.0
    """Seconds that ranking alone took on the device; 0 where nothing says so."""
    answered_at: float = 0.0
    """When the daemon answered, as `time.monotonic` has it; 0 where nothing says so."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The highest-ranked tokens of each KV head."""

    ids: npt.NDArray[np.uint32]
    """uint32 [kv_heads, k], ascending in each head."""
    scores: npt.NDArray[np.int32]
    """int32 [kv_heads, k], of the same order; they compare within a head and generation only."""
    evaluated_bytes: int
    """Evaluation keys scanned."""


class _Buffers(NamedTuple):
    query: npt.NDArray[Any]
    held: npt.NDArray[Any]
    ids: npt.NDArray[Any]
    scores: npt.NDArray[Any]
    rows: npt.NDArray[Any]


class Plan:
    """A request and its arena regions, laid out once for every call with the same shapes.

    Layers and tokens ask the same again and again with other contents. Building
    messages and views costs more than filling them.
    """

    def __init__(
        self,
        staging: Staging,
        items: Sequence[EvaluateItem],
        reduction: Reduction,
        shapes: tuple[Any, ...],
        bring: bool = True,
    ) -> None:
        self.shapes = shapes
        self._bring = bring
        self.request = cold_pool_pb2.EvaluateRequest(
            query_heads=items[0].query.shape[0], reduction=number(reduction)
        )
        staging.reset()
        fixed = [self._add(staging, item) for item in items]
        self.buffers: list[_Buffers] = []
        share = staging.free // len(items)
        for item, evaluation, (query, held, ids, scores) in zip(
            items, self.request.evaluations, fixed, strict=True
        ):
            shape = item.context.shape
            if not bring:
                self.buffers.append(_Buffers(query, held, ids, scores, np.empty(0, shape.dtype.storage)))
                continue
            room = min(shape.kv_heads * item.k, (share - ALIGNMENT) // shape.row_bytes)
            # At least one, so that an arena without room says so.
            region, rows = staging.take((max(1, room), 2, shape.head_dim), shape.dtype.storage)
            evaluation.rows.CopyFrom(region)
            self.buffers.append(_Buffers(query, held, ids, scores, rows))
        self._packed = pack_request(_as_packed(self.request, staging.generation))

    def _add(self, staging: Staging, item: EvaluateItem) -> tuple[npt.NDArray[Any], ...]:
        shape = item.context.shape
        check_query(item.query, shape.kv_heads, shape.head_dim, self.request.query_heads)
        if item.k < 1:
            raise InvalidInput(f"k must be at least 1, not {item.k}")
        if item.held.ndim != 2 or item.held.shape[0] != shape.kv_heads or item.held.dtype != np.uint32:
            raise InvalidInput(
                f"held must be uint32 [{shape.kv_heads}, S], not {item.held.dtype} {list(item.held.shape)}"
            )
        query_region, query = staging.take(item.query.shape, np.float32)
        held_region, held = staging.take(item.held.shape, np.uint32)
        ids_region, ids = staging.take((shape.kv_heads, item.k), np.uint32)
        scores_region, scores = staging.take((0 if self._bring else shape.kv_heads, item.k), np.int32)
        self.request.evaluations.add(
            context_id=item.context.context_id,
            k=item.k,
            query=query_region,
            held=held_region,
            ids=ids_region,
            scores=scores_region,
        )
        return query, held, ids, scores

    def fill(self, items: Sequence[EvaluateItem]) -> None:
        """Puts this call's contents into the regions."""
        for item, buffers in zip(items, self.buffers, strict=True):
            buffers.query[...] = item.query
            buffers.held[...] = item.held

    def packed(self, layer: int, items: Sequence[EvaluateItem]) -> bytes:
        """The request for the ring."""
        return ask_again(self._packed, layer, ((item.first, item.end) for item in items))

    def taken(self, answer: Answer) -> list[Brought]:
        """What the daemon put into the regions: copies."""
        return [
            Brought(
                buffers.ids.copy(),
                result.missing_per_head,
                buffers.rows[: result.rows_brought].copy(),
                result.generation,
                result.evaluated_bytes,
                result.read_bytes,
                None if self._bring else buffers.scores.copy(),
                result.scan_s,
                answer.answered_at,
            )
            for buffers, result in zip(self.buffers, answer.results, strict=True)
        ]

    def message(self, layer: int, items: Sequence[EvaluateItem]) -> cold_pool_pb2.EvaluateRequest:
        """The request for gRPC."""
        self.request.layer = layer
        for item, evaluation in zip(items, self.request.evaluations, strict=True):
            evaluation.first_token = item.first
            evaluation.end_token = item.end
        return self.request


def _as_packed(request: cold_pool_pb2.EvaluateRequest, generation: int) -> Request:
    def region(each: cold_pool_pb2.Region) -> Region:
        return Region(each.offset, each.length)

    items = [
        Item(
            context_id=item.context_id,
            first_token=0,
            end_token=0,
            k=item.k,
            query=region(item.query),
            ids=region(item.ids),
            scores=region(item.scores),
            held=region(item.held),
            rows=region(item.rows),
        )
        for item in request.evaluations
    ]
    return Request(0, request.query_heads, request.reduction, generation, items)


def shapes_of(items: Sequence[EvaluateItem], reduction: Reduction, bring: bool = True) -> tuple[Any, ...]:
    """What a `Plan` depends on."""
    return (
        reduction,
        bring,
        *((item.context, item.query.shape, item.query.dtype, item.k, item.held.shape) for item in items),
    )


def bytes_needed(items: Sequence[EvaluateItem], bring: bool) -> int:
    """Bytes of shared memory for an evaluation if no winner's row is held, at most: as `Plan` lays it out."""
    fixed, rows = PAGE, 0
    for item in items:
        shape = item.context.shape
        winners = shape.kv_heads * item.k
        # Ids, and scores in place of rows; four regions, each aligned.
        fixed += item.query.nbytes + item.held.nbytes + (4 if bring else 8) * winners + 4 * ALIGNMENT
        rows = max(rows, winners * shape.row_bytes + ALIGNMENT if bring else 0)
    return fixed + len(items) * rows


def check_kept(items: Sequence[Any]) -> None:
    """Raises `ContextLost` for items with a lost context, before there is any waiting for a daemon."""
    for item in items:
        item.context.check_kept()


def check_query(
    query: npt.NDArray[Any], kv_heads: int, head_dim: int, query_heads: int | None = None
) -> None:
    """Raises `InvalidInput` unless `query` is float32 [query_heads, head_dim]."""
    if (
        query.ndim != 2
        or query.dtype != np.float32
        or query.shape[1] != head_dim
        or query.shape[0] % kv_heads
        or query.shape[0] == 0
        or query.shape[0] != (query_heads or query.shape[0])
    ):
        raise InvalidInput(
            f"the query must be float32 [query_heads, {head_dim}] with query_heads a multiple of {kv_heads} "
            f"and the same for every item, not {query.dtype} {list(query.shape)}"
        )


def evaluate_alone(
    context: Context,
    layer: int,
    query: npt.NDArray[np.float32],
    k: int,
    first: int,
    end: int | None,
    reduction: Reduction,
) -> Selection:
    """See `Context.evaluate`."""
    shape = context.shape
    check_query(query, shape.kv_heads, shape.head_dim)
    flushed = context.flushed(layer)
    end = flushed if end is None else end
    if not 0 <= first <= end <= flushed:
        raise InvalidInput(f"cannot rank tokens {first} to {end}: the layer has {flushed} flushed tokens")
    if not 1 <= k <= end - first:
        raise InvalidInput(f"k must be 1 to {end - first}, the number of tokens to rank, not {k}")
    with context.session.lock:
        staging = context.session.staging()
        staging.reset()
        query_region, staged = staging.take(query.shape, np.float32)
        ids_region, ids = staging.take((shape.kv_heads, k), np.uint32)
        scores_region, scores = staging.take((shape.kv_heads, k), np.int32)
        staged[...] = query
        request = cold_pool_pb2.EvaluateRequest(
            layer=layer, query_heads=query.shape[0], reduction=number(reduction)
        )
        request.evaluations.add(
            context_id=context.context_id,
            first_token=first,
            end_token=end,
            k=k,
            query=query_region,
            ids=ids_region,
            scores=scores_region,
        )
        result = context.session.ask(request).results[0]
        return Selection(ids.copy(), scores.copy(), result.evaluated_bytes)


def bring_left_behind(layer: int, items: Sequence[EvaluateItem], brought: Sequence[Brought]) -> None:
    """Fetches the missing rows that the arena had no room for. Under the session's lock; blocks."""
    for item, answer in zip(items, brought, strict=True):
        if len(answer.rows) < sum(answer.missing_per_head):
            counters = item.context.session.counters
            before = counters.read_bytes
            left = _left_behind(item, answer.ids, len(answer.rows))
            answer.rows = np.concatenate([answer.rows, item.context.fetch_rows(layer, left)])
            answer.read_bytes += counters.read_bytes - before


def _left_behind(
    item: EvaluateItem, ids: npt.NDArray[np.uint32], brought: int
) -> list[npt.NDArray[np.uint32]]:
    """The missing ids of each KV head, without the first `brought` rows, which did fit in the arena."""
    left = []
    for winners, held in zip(ids, item.held, strict=True):
        missing = winners[~np.isin(winners, held)]
        left.append(missing[brought:])
        brought = max(0, brought - len(missing))
    return left
