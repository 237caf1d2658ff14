"""Rows that come back: from the cold pool through the shared memory, from the tail as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hillinfer.rows import Array
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import PAGE
from hillinfer_core.v1 import cold_pool_pb2

if TYPE_CHECKING:
    from hillinfer.context import Context


def fetch_rows(context: Context, layer: int, ids: Array | Sequence[Array]) -> Array:
    """See `Context.fetch_rows`."""
    shape = context.shape
    if len(ids) != shape.kv_heads or any(np.ndim(wanted) != 1 for wanted in ids):
        raise InvalidInput(f"ids must be a 1-d array for each of the {shape.kv_heads} KV heads")
    counts = np.array([len(wanted) for wanted in ids])
    flat = np.concatenate(list(ids)) if counts.sum() else np.empty(0, np.uint32)
    if flat.dtype.kind not in "ui":
        raise InvalidInput(f"ids must be integers, not {flat.dtype}")
    with context.session.lock:
        length, flushed = context.length(layer), context.flushed(layer)
        if len(flat) and (flat.min() < 0 or flat.max() >= length):
            raise InvalidInput(
                f"ids must be 0 to {length - 1}, the tokens appended; got {flat.min()} to {flat.max()}"
            )
        rows = np.empty((len(flat), 2, shape.head_dim), shape.dtype.storage)
        heads = np.repeat(np.arange(len(counts)), counts)
        cold = flat < flushed
        if cold.all():
            _fetch_cold(context, layer, heads, flat, rows)
        else:
            brought = np.empty((int(cold.sum()), *rows.shape[1:]), rows.dtype)
            _fetch_cold(context, layer, heads[cold], flat[cold], brought)
            rows[cold] = brought
            rows[~cold] = context.tail(layer)[heads[~cold], flat[~cold] - flushed]
        return rows


def _fetch_cold(context: Context, layer: int, heads: Array, ids: Array, out: Array) -> None:
    """Fetch flushed rows, sorted by head, into `out`, as many at a time as the arena takes."""
    shape, staging = context.shape, context.session.staging()
    piece = (staging.nbytes - PAGE) // (shape.row_bytes + ids.itemsize)
    for start in range(0, len(ids), piece):
        part = slice(start, min(start + piece, len(ids)))
        staging.reset()
        rows_region, rows = staging.take(out[part].shape, out.dtype)
        ids_region, staged = staging.take(ids[part].shape, np.uint32)
        staged[...] = ids[part]
        count_per_head = np.bincount(heads[part], minlength=shape.kv_heads)
        which = cold_pool_pb2.Ids(count_per_head=count_per_head.tolist(), ids=ids_region)
        context.fetch_into(layer, rows_region, by_ids=which)
        out[part] = rows


def fetch_range(context: Context, layer: int, first: int, count: int) -> Array:
    """See `Context.fetch_range`."""
    shape = context.shape
    with context.session.lock:
        length, flushed = context.length(layer), context.flushed(layer)
        if first < 0 or count < 0 or first + count > length:
            raise InvalidInput(f"cannot fetch {count} tokens from {first}: the layer has {length} tokens")
        out = np.empty((shape.kv_heads, count, 2, shape.head_dim), shape.dtype.storage)
        staging = context.session.staging()
        piece = staging.nbytes // (shape.kv_heads * shape.row_bytes)
        cold = max(0, min(count, flushed - first))
        for start in range(0, cold, piece):
            part = out[:, start : min(start + piece, cold)]
            staging.reset()
            region, rows = staging.take(part.shape, part.dtype)
            which = cold_pool_pb2.TokenRange(first_token=first + start, count=part.shape[1])
            context.fetch_into(layer, region, range=which)
            part[...] = rows
        if cold < count:
            in_tail = first + cold - flushed
            out[:, cold:] = context.tail(layer)[:, in_tail : in_tail + count - cold]
        return out
