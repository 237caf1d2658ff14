"""Ranking tokens, and bringing the rows of winners that the client lacks."""

from __future__ import annotations

import time

import numpy as np

from hillinfer_core import exchange
from hillinfer_core.arena import Arena
from hillinfer_core.errors import InvalidInput
from hillinfer_core.exchange import Winners, hand_over, quantised_query
from hillinfer_core.layout import Reduction
from hillinfer_core.packed import Evaluated, Item

from ..driver.contract import Driver
from . import messages, rows
from .apart import evaluate_apart
from .keys import KeyKeeper, Ranking, scanned_bytes
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
    if ask.reduction is Reduction.none:
        # A copy: the client can change its arena at any time.
        query = arena.view(item.query.offset, (ask.query_heads, shape.head_dim), np.float32).copy()
        return evaluate_apart(driver, keys, arena, store, item, query, traffic)

    ranges, places = store.quantisation.ranges, store.places
    room = item.rows.length // shape.row_bytes
    held = keys.held(store, item.first_token, item.end_token)
    if held is not None:
        lacking, scan_s = exchange.evaluate(
            arena, item, ask.query_heads, ask.reduction, ranges, held, places, room
        )
        scanned, read = scanned_bytes(shape, item.first_token, item.end_token), 0
        traffic.evaluated += scanned
    else:
        q, offsets = quantised_query(arena, item.query.offset, ask.query_heads, ranges, ask.reduction)
        began = time.perf_counter()
        won = keys.rank(store, Ranking(q, item.first_token, item.end_token, item.k, offsets=offsets), traffic)
        scan_s, scanned, read = time.perf_counter() - began, won.scanned, won.read
        scores_at = item.scores.offset if item.scores.length else None
        winners = Winners(won.ids, won.scores, item.end_token, item.ids.offset, scores_at)
        lacking = hand_over(arena, winners, item.held, places, room)
    brought = len(lacking.ids)
    if brought:
        out = arena.view(item.rows.offset, (brought, shape.row_bytes), np.uint8)
        gathered = rows.bring(driver, lacking, out)
        traffic.read += gathered
        read += gathered
    generation = store.quantisation.generation
    return Evaluated(generation, lacking.counts, brought, scanned, read, scan_s)
