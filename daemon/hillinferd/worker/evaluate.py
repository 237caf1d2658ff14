"""Ranking tokens, and bringing the rows of winners that the client lacks."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from hillinfer_core import kernel
from hillinfer_core.arena import Arena
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Reduction
from hillinfer_core.packed import Evaluated, Item
from hillinfer_core.rows import missing

from ..driver.contract import Driver
from . import messages, rows
from .apart import evaluate_apart
from .keys import KeyKeeper, Ranking
from .store import LayerStore


def evaluate(
    driver: Driver,
    keys: KeyKeeper,
    arena: Arena,
    store: LayerStore,
    ask: messages.Evaluate,
    item: Item,
    traffic: messages.Traffic,
) -> Evaluated:
    """Carry out one evaluation; see ``Evaluation`` in cold_pool.proto.

    Raises :class:`InvalidInput` for a query with NaN or infinity, ``CorruptData`` or ``OSError`` for rows.
    """
    shape = store.shape
    if store.quantisation is None or item.end_token > store.tokens:
        raise InvalidInput(f"the worker's layer holds {store.tokens} tokens, not {item.end_token}")
    # Copies: the client can change its arena at any time.
    query = arena.view(item.query.offset, (ask.query_heads, shape.head_dim), np.float32).copy()
    if ask.reduction is Reduction.none:
        return evaluate_apart(driver, keys, arena, store, item, query, traffic)
    held = _held(arena, item, shape.kv_heads)

    q, offsets, _ = kernel.quantise_query(query, store.quantisation.ranges, ask.reduction)
    streamed = traffic.streamed
    ranking = Ranking(q, item.first_token, item.end_token, item.k, offsets=offsets)
    began = time.perf_counter()
    won = keys.rank(store, ranking, traffic)
    scan_s = time.perf_counter() - began
    ids, best = won.ids, won.scores

    arena.view(item.ids.offset, ids.shape, np.uint32)[:] = ids
    if item.scores.length:
        arena.view(item.scores.offset, best.shape, np.int32)[:] = best

    counts, heads, tokens = missing(ids, held, item.end_token)
    brought = min(len(tokens), item.rows.length // shape.row_bytes)
    read = traffic.streamed - streamed
    if brought:
        out = arena.view(item.rows.offset, (brought, shape.row_bytes), np.uint8)
        gathered = rows.gather(driver, store, heads[:brought], tokens[:brought], out)
        traffic.read += gathered
        read += gathered
    generation = store.quantisation.generation
    return Evaluated(generation, counts.tolist(), brought, won.scanned, read, scan_s)


def _held(arena: Arena, item: Item, heads: int) -> npt.NDArray[np.uint32]:
    per_head = item.held.length // (4 * heads)
    if per_head == 0:
        return np.empty((heads, 0), np.uint32)
    return arena.view(item.held.offset, (heads, per_head), np.uint32).copy()
