"""Ranking tokens, and bringing the rows of winners that the client lacks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hillinfer_core import kernel
from hillinfer_core.arena import Arena
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import TILE_TOKENS

from ..driver.contract import Driver
from . import messages, rows
from .store import LayerStore


class Scratch:
    """A buffer for scores that grows to the largest use and is used again."""

    def __init__(self) -> None:
        self._scores = np.empty(0, np.int32)

    def scores(self, heads: int, columns: int) -> npt.NDArray[np.int32]:
        """Return an int32 [heads, columns] array with undefined content."""
        if self._scores.size < heads * columns:
            self._scores = np.empty(heads * columns, np.int32)
        return self._scores[: heads * columns].reshape(heads, columns)


def evaluate(
    driver: Driver,
    arena: Arena,
    store: LayerStore,
    ask: messages.Evaluate,
    item: messages.Evaluation,
    scratch: Scratch,
    traffic: messages.Traffic,
) -> messages.Evaluated:
    """Carry out one evaluation; see ``Evaluation`` in cold_pool.proto.

    Raises :class:`InvalidInput` for a query with NaN or infinity, ``CorruptData`` or ``OSError`` for rows.
    """
    shape = store.shape
    if store.keys is None or item.end_token > store.tokens:
        raise InvalidInput(f"the worker's layer holds {store.tokens} tokens, not {item.end_token}")
    # Copies: the client can change its arena at any time.
    query = arena.view(item.query.offset, (ask.query_heads, shape.head_dim), np.float32).copy()
    held = _held(arena, item, shape.kv_heads)

    q, _ = kernel.quantise_query(query, store.keys.ranges, ask.reduction)
    origin = item.first_token // TILE_TOKENS * TILE_TOKENS
    columns = -(-item.end_token // TILE_TOKENS) * TILE_TOKENS - origin
    scores = scratch.scores(shape.kv_heads, columns)
    evaluated = store.score(q, item.first_token, item.end_token, scores)
    traffic.evaluated += evaluated
    wanted = scores[:, item.first_token - origin : item.end_token - origin]
    ids, best = kernel.top_k(wanted, item.k, item.first_token)

    arena.view(item.ids.offset, ids.shape, np.uint32)[:] = ids
    if item.scores.length:
        arena.view(item.scores.offset, best.shape, np.int32)[:] = best

    missing = [_missing(ids[head], held[head], item.end_token) for head in range(shape.kv_heads)]
    counts = [len(tokens) for tokens in missing]
    brought = min(sum(counts), item.rows.length // shape.row_bytes)
    read = 0
    if brought:
        heads = np.repeat(np.arange(shape.kv_heads), counts)[:brought]
        tokens = np.concatenate(missing)[:brought].astype(np.int64)
        out = arena.view(item.rows.offset, (brought, shape.row_bytes), np.uint8)
        read = rows.gather(driver, store, heads, tokens, out)
        traffic.read += read
    return messages.Evaluated(store.generation, counts, brought, evaluated, read)


def _held(arena: Arena, item: messages.Evaluation, heads: int) -> npt.NDArray[np.uint32]:
    per_head = item.held.length // (4 * heads)
    if per_head == 0:
        return np.empty((heads, 0), np.uint32)
    return arena.view(item.held.offset, (heads, per_head), np.uint32).copy()


def _missing(ids: npt.NDArray[np.uint32], held: npt.NDArray[np.uint32], end: int) -> npt.NDArray[np.uint32]:
    if not len(held):
        return ids
    # A table is several times faster than np.isin at the thousands of ids there are here.
    has = np.zeros(end, np.bool_)
    has[held[held < end]] = True
    return ids[~has[ids]]
