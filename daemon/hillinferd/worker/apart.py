"""Ranking for each query head apart: what guarantee mode needs (docs/guarantee.md)."""

from __future__ import annotations

import time

import numpy as np

from hillinfer_core.arena import Arena
from hillinfer_core.mass import wide_query
from hillinfer_core.packed import Evaluated, Item
from hillinfer_core.reference import F32, Ranked

from ..driver.contract import Driver
from . import messages, rows
from .keys import PIECE_TOKENS, KeyKeeper, Ranking
from .store import LayerStore

_UNCLIPPED_SPAN = 1e38
"""Ranges wider than this may overflow float32 on the way to a level, and clip even keys that they cover."""


def evaluate_apart(
    driver: Driver,
    keys: KeyKeeper,
    arena: Arena,
    store: LayerStore,
    item: Item,
    query: F32,
    traffic: messages.Traffic,
) -> Evaluated:
    """Carry out an evaluation with ``Reduction.none`` for ``query`` float32 [query_heads, head_dim].

    Raises as :func:`~hillinferd.worker.evaluate.evaluate` does.
    """
    assert store.quantisation is not None
    ranges, precision = store.quantisation.ranges, store.shape.precision
    before = traffic.read
    _find_clipped(driver, store, traffic)
    q, scale = wide_query(query, ranges, precision)
    began = time.perf_counter()
    won = keys.rank(store, Ranking(q, item.first_token, item.end_token, item.k, histogram=True), traffic)
    scan_s = time.perf_counter() - began
    ranked = Ranked(won.ids, won.scores, won.histogram)
    ranked, scale = store.clipped.raised(
        ranked, query, q, scale, ranges, precision, item.first_token, item.end_token
    )
    assert ranked.histogram is not None
    arena.view(item.ids.offset, ranked.ids.shape, np.uint32)[:] = ranked.ids
    if item.scores.length:
        arena.view(item.scores.offset, ranked.scores.shape, np.int32)[:] = ranked.scores
    arena.view(item.histogram.offset, ranked.histogram.shape, np.uint32)[:] = ranked.histogram
    arena.view(item.scales.offset, (len(query), 6), np.float64)[:] = scale.packed
    read = traffic.read - before
    return Evaluated(store.quantisation.generation, [], 0, won.scanned, read, scan_s)


def _find_clipped(driver: Driver, store: LayerStore, traffic: messages.Traffic) -> None:
    """Have the clipped tokens of all tokens; those not looked at yet are read back, once."""
    how, shape, clipped = store.quantisation, store.shape, store.clipped
    assert how is not None
    clipped.begin(how.generation, shape.kv_heads, shape.head_dim, shape.dtype.storage)
    if how.clipped == 0 and float(how.ranges.scale.max()) * shape.precision.levels < _UNCLIPPED_SPAN:
        return
    for first in range(clipped.end, store.tokens, PIECE_TOKENS):
        piece, read = rows.read_range(driver, store, first, min(PIECE_TOKENS, store.tokens - first))
        traffic.read += read
        clipped.add(piece, how.ranges, shape.precision)
