"""Appending rows to a layer: check, quantise, write, and only then account."""

from __future__ import annotations

import numpy as np

from hillinfer_core import kernel
from hillinfer_core.arena import Arena
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Shape
from hillinfer_core.reference import F32, Ranges

from ..driver.contract import Driver
from ..logs import get_logger
from . import messages, rows
from .store import Keys, LayerStore, Rows, Segment, put_tiles, split

log = get_logger(__name__)

ENOUGH_TO_FIT = 1024
"""Tokens from which ranges are representative: a smaller first append is fitted again on reaching it."""

CLIPPED_LIMIT = 0.01
"""Share of key elements outside their range above which a layer is quantised again."""

LEAST_GROWTH = 1 / 16
"""Share of new tokens that another fit waits for, so that drifting keys do not cost a pass each append."""

_PIECE_TOKENS = 1024


def append(
    driver: Driver, arena: Arena, store: LayerStore, ask: messages.Append, traffic: messages.Traffic
) -> None:
    """Carry out ``ask``; raises with nothing changed that a reader could see.

    :class:`InvalidInput` for rows with NaN or infinity, ``CorruptData`` if rows read back to fit ranges again
    are damaged, ``OSError`` from the drive.
    """
    shape = store.shape
    if ask.first_token != store.tokens:
        raise InvalidInput(f"the worker's layer holds {store.tokens} tokens, not {ask.first_token}")
    new = arena.view(ask.rows.offset, (shape.kv_heads, ask.tokens, 2, shape.head_dim), shape.dtype.storage)
    end = ask.first_token + ask.tokens
    ranges = store.keys.ranges if store.keys else kernel.fit_ranges(kernel.widen_keys(new), shape.precision)
    tiles, clipped, nonfinite = kernel.quantise_keys(new, ranges, shape.precision)
    if nonfinite:
        raise InvalidInput(f"rows contain {nonfinite} numbers that are NaN or infinite; nothing was appended")
    keys = _counted(store.keys, ranges, ask.tokens, clipped)
    added = [Segment.empty(placed, shape) for placed in ask.placed]
    segments = store.segments + added

    checksums = kernel.row_checksums(new.reshape(-1, 2, shape.head_dim)).reshape(shape.kv_heads, ask.tokens)
    traffic.written += _write(driver, arena, segments, shape, ask)

    if _should_refit(keys, shape, ask.first_token, end):
        keys, segments = _requantised(driver, store, new, segments, traffic)
        log.info(
            "evaluation keys quantised again",
            context=ask.context_id,
            layer=ask.layer,
            tokens=end,
            generation=store.generation + 1,
        )
        store.segments, added = segments[: len(store.segments)], segments[len(store.segments) :]
        store.generation += 1
    else:
        put_tiles(segments, ask.first_token, tiles)
    store.add_segments(added)
    store.put_checksums(ask.first_token, checksums)
    store.keys = keys
    store.tokens = end


def _counted(keys: Keys | None, ranges: Ranges, tokens: int, clipped: int) -> Keys:
    if keys is None:
        return Keys(ranges, tokens)
    return Keys(ranges, keys.fitted_tokens, keys.later_tokens + tokens, keys.clipped + clipped)


def _should_refit(keys: Keys, shape: Shape, before: int, after: int) -> bool:
    if before == 0:
        return False
    grown = keys.fitted_tokens < ENOUGH_TO_FIT <= after and before < ENOUGH_TO_FIT
    elements = keys.later_tokens * shape.kv_heads * shape.head_dim
    due = keys.later_tokens >= LEAST_GROWTH * keys.fitted_tokens
    return grown or (due and keys.clipped > CLIPPED_LIMIT * elements)


def _requantised(
    driver: Driver, store: LayerStore, new: Rows, segments: list[Segment], traffic: messages.Traffic
) -> tuple[Keys, list[Segment]]:
    """Fit ranges to every row, old ones read back and ``new`` ones, and return fresh keys and segments."""
    shape = store.shape
    pieces = range(0, store.tokens, _PIECE_TOKENS)

    def old(first: int) -> Rows:
        count = min(_PIECE_TOKENS, store.tokens - first)
        piece, read = rows.read_range(driver, store, first, count)
        traffic.read += read
        return piece

    extremes = [
        _extremes(kernel.widen_keys(new)),
        *(_extremes(kernel.widen_keys(old(first))) for first in pieces),
    ]
    # The least and the greatest key of a channel are all that a fit looks at.
    ranges = kernel.fit_ranges(np.concatenate(extremes, axis=1), shape.precision)
    fresh = [Segment.empty(segment.placed, shape) for segment in segments]
    for first in pieces:
        put_tiles(fresh, first, kernel.quantise_keys(old(first), ranges, shape.precision)[0])
    put_tiles(fresh, store.tokens, kernel.quantise_keys(new, ranges, shape.precision)[0])
    return Keys(ranges, store.tokens + new.shape[1]), fresh


def _extremes(keys: F32) -> F32:
    return np.stack((keys.min(axis=1), keys.max(axis=1)), axis=1)


def _write(driver: Driver, arena: Arena, segments: list[Segment], shape: Shape, ask: messages.Append) -> int:
    end = ask.first_token + ask.tokens
    written = 0
    for placed, low, high in split([segment.placed for segment in segments], ask.first_token, end):
        length = (high - low) * shape.row_bytes
        for head in range(shape.kv_heads):
            source = ask.rows.offset + (head * ask.tokens + low - ask.first_token) * shape.row_bytes
            driver.write(placed.row_offset(head, low, shape.row_bytes), arena.buffer(source, length))
            written += length
    return written
