"""Appending rows to a layer: check, quantise, write, and only then account."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hillinfer_core import kernel
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Shape
from hillinfer_core.reference import F32, U8

from ..domain.content import Appended
from ..domain.quantisation import Quantisation
from ..driver.contract import Driver
from ..logs import get_logger
from . import messages, rows
from .keys import PIECE_TOKENS, KeyKeeper, quantised
from .store import LayerStore, Rows, Segment, split

log = get_logger(__name__)

ENOUGH_TO_FIT = 1024
"""Tokens from which ranges are representative: a smaller first append is fitted again on reaching it."""

CLIPPED_LIMIT = 0.01
"""Share of key elements outside their range above which a layer is quantised again."""

LEAST_GROWTH = 1 / 16
"""Share of new tokens that another fit waits for, so that drifting keys do not cost a pass each append."""


def append(
    driver: Driver,
    keys: KeyKeeper,
    store: LayerStore,
    ask: messages.Append,
    data: U8,
    traffic: messages.Traffic,
) -> Appended:
    """Carry out ``ask`` with the bytes ``data`` of its rows, which are page-aligned and only ours.

    Raises with nothing changed that a reader could see: :class:`InvalidInput` for rows with NaN or infinity,
    ``MemoryLimit``, ``CorruptData`` if rows read back to fit ranges again are damaged, ``OSError`` from the
    drive.
    """
    shape = store.shape
    if ask.first_token != store.tokens:
        raise InvalidInput(f"the worker's layer holds {store.tokens} tokens, not {ask.first_token}")
    new = data.view(shape.dtype.storage).reshape(shape.kv_heads, ask.tokens, 2, shape.head_dim)
    end = ask.first_token + ask.tokens
    how = store.quantisation or _first(new, shape)
    tiles, clipped, nonfinite = kernel.quantise_keys(new, how.ranges, shape.precision)
    if nonfinite:
        raise InvalidInput(f"rows contain {nonfinite} numbers that are NaN or infinite; nothing was appended")
    if store.quantisation:
        how = replace(how, later_tokens=how.later_tokens + ask.tokens, clipped=how.clipped + clipped)
    added = [Segment(placed) for placed in ask.placed]
    segments = store.segments + added

    keys.make_room(store, ask.tokens)
    try:
        checksums = kernel.row_checksums(new.reshape(-1, 2, shape.head_dim)).reshape(shape.kv_heads, -1)
        traffic.written += _write(driver, data, segments, shape, ask)
        again = _should_refit(how, store, end)
        if again:
            how, segments = _refitted(driver, keys, store, new, segments, traffic)
        else:
            keys.put(store, segments, ask.first_token, tiles)
        full = [
            keys.write_unsealed(store, segment, end, traffic)
            for segment in segments
            if segment.sealed is None and segment.placed.end_token <= end
        ]
        store.reserve_checksums(end)
        if ask.durable:
            driver.flush()
    except BaseException:
        keys.give_room_back(store, ask.tokens)
        raise

    if again:
        log.info(
            "evaluation keys quantised again",
            context=ask.context_id,
            layer=ask.layer,
            tokens=end,
            generation=how.generation,
        )
        for segment in store.segments:
            if segment.sealed:
                keys.forget(segment.sealed)
    store.set_segments(segments)
    for segment, sealed, packed in full:
        keys.seal(store, segment, sealed, packed)
    store.put_checksums(ask.first_token, checksums)
    store.quantisation = how
    store.tokens = end
    changed = store.segments if again else [segment for segment, _, _ in full]
    return Appended(how, [segment.record for segment in changed if segment.record], checksums)


def _first(new: Rows, shape: Shape) -> Quantisation:
    return Quantisation(kernel.fit_ranges(kernel.widen_keys(new), shape.precision), new.shape[1])


def _should_refit(how: Quantisation, store: LayerStore, after: int) -> bool:
    # What a context shares with others cannot change.
    if store.tokens == 0 or any(segment.shared for segment in store.segments):
        return False
    grown = how.fitted_tokens < ENOUGH_TO_FIT <= after and store.tokens < ENOUGH_TO_FIT
    elements = how.later_tokens * store.shape.kv_heads * store.shape.head_dim
    due = how.later_tokens >= LEAST_GROWTH * how.fitted_tokens
    return grown or (due and how.clipped > CLIPPED_LIMIT * elements)


def _refitted(
    driver: Driver,
    keys: KeyKeeper,
    store: LayerStore,
    new: Rows,
    segments: list[Segment],
    traffic: messages.Traffic,
) -> tuple[Quantisation, list[Segment]]:
    """Fit ranges to every row, old ones read back and ``new`` ones; return fresh segments with their keys.

    Sealed keys are written over the old ones. If that is not carried to its end, the old ones fail their
    checksum when they are next read from the pool, and are made anew.
    """
    shape, precision = store.shape, store.shape.precision
    assert store.quantisation is not None
    # The least and the greatest key of a channel are all that a fit looks at.
    extremes = [_extremes(kernel.widen_keys(new))]
    for first in range(0, store.tokens, PIECE_TOKENS):
        piece, read = rows.read_range(driver, store, first, min(PIECE_TOKENS, store.tokens - first))
        traffic.read += read
        extremes.append(_extremes(kernel.widen_keys(piece)))
    ranges = kernel.fit_ranges(np.concatenate(extremes, axis=1), precision)
    generation = store.quantisation.generation + 1
    how = Quantisation(ranges, store.tokens + new.shape[1], generation=generation)

    fresh = [Segment(segment.placed) for segment in segments]
    for old, segment in zip(store.segments, fresh, strict=False):
        first = old.placed.first_token
        tokens = min(old.placed.end_token, store.tokens) - first
        tiles = quantised(driver, store, how, first, tokens, traffic)
        if old.sealed:
            segment.seal(shape, keys.write(store, segment.placed, tiles, traffic))
        else:
            keys.put(store, [segment], first, tiles)
    keys.put(store, fresh, store.tokens, kernel.quantise_keys(new, ranges, precision)[0])
    return how, fresh


def _extremes(keys: F32) -> F32:
    return np.stack((keys.min(axis=1), keys.max(axis=1)), axis=1)


def _write(driver: Driver, data: U8, segments: list[Segment], shape: Shape, ask: messages.Append) -> int:
    end = ask.first_token + ask.tokens
    written = 0
    for placed, low, high in split([segment.placed for segment in segments], ask.first_token, end):
        length = (high - low) * shape.row_bytes
        for head in range(shape.kv_heads):
            source = (head * ask.tokens + low - ask.first_token) * shape.row_bytes
            driver.write(placed.row_offset(head, low, shape.row_bytes), data[source : source + length].data)
            written += length
    return written
