"""What the worker reads from a client's arena and writes to it for an evaluation: one native call each way.

Where the keys to rank are in memory, one call does all of it, ranking included. The client can write to its
arena at any time: what is read is copied before it is looked at, and nothing that was written is read back.
No call waits for anything.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import _native
from .arena import Arena
from .errors import InvalidInput
from .kernel import code_and_threads
from .layout import Reduction
from .packed import Item, Region
from .reference import I8, I32, U8, U32, Ranges
from .rows import I64, U64, RowPlaces

# Outcome of arena.cpp
_OUTSIDE, _NOT_FINITE = 1, 2


def quantised_query(
    arena: Arena, offset: int, query_heads: int, ranges: Ranges, reduction: Reduction
) -> tuple[I8, I32]:
    """Return q and offsets of :func:`.reference.quantise_query` for the query at byte ``offset``.

    It is float32 [query_heads, head_dim], a multiple of the heads of ``ranges``; the reduction is sum or max.
    Raises :class:`InvalidInput` for one that does not lie in the ``arena`` or is not finite once scaled.
    """
    heads, dim = ranges.scale.shape
    group = query_heads // heads
    vectors = 1 if reduction is Reduction.sum else group
    q, offsets = np.empty((heads, vectors, dim), np.int8), np.empty((heads, vectors), np.int32)
    outcome = _native.quantise_query_of(
        arena.content, offset, np.ascontiguousarray(ranges.scale), np.ascontiguousarray(ranges.zero),
        reduction is Reduction.sum, q, offsets, group,
    )  # fmt: skip
    if outcome == _OUTSIDE:
        raise InvalidInput("the query does not lie in the arena")
    if outcome:
        raise _not_finite()
    return q, offsets


class Winners(NamedTuple):
    """What was ranked best, ``ids`` uint32 [H, k] and ``scores`` int32 [H, k]; where each goes in the arena.

    ``scores_at`` is None where they are not wanted. ``end`` is one past the last token that was ranked.
    """

    ids: U32
    scores: I32
    end: int
    ids_at: int
    scores_at: int | None


class Lacking(NamedTuple):
    """Rows that a client lacks: ``counts`` of each KV head in all, and all else of those to be brought.

    ``heads`` int64 [n], ``ids`` int64 [n], byte ``offsets`` uint64 [n], ``checksums`` uint32 [n];
    head by head, in the order of the winners' ids.
    """

    counts: list[int]
    heads: I64
    ids: I64
    offsets: U64
    checksums: U32


def hand_over(arena: Arena, won: Winners, held: Region, layer: RowPlaces, most: int) -> Lacking:
    """Put the winners ``won`` into the ``arena``, and find the rows of those that its region ``held`` lacks.

    ``held`` is uint32 [H, S]; what is from ``won.end`` on there stands for no token. At most ``most``
    rows are to be brought. Raises :class:`InvalidInput` for a region outside the arena, or a row that does
    not exist.
    """
    heads, k = won.ids.shape
    found, offsets = np.empty((2, heads * k), np.int64), np.empty(heads * k, np.uint64)
    checksums = np.empty(heads * k, np.uint32)
    answer = _native.hand_over(
        arena.content, won.ids, won.ids_at, won.scores, won.scores_at,
        held.offset, held.length // (4 * heads), won.end,
        layer.extents, layer.row_bytes, layer.tokens, layer.checksums, most, found, offsets, checksums,
    )  # fmt: skip
    if answer is None:
        raise InvalidInput("a region for ids, scores or held is not in the arena, or a row does not exist")
    counts, total = answer
    brought = min(total, most)
    return Lacking(counts, found[0, :brought], found[1, :brought], offsets[:brought], checksums[:brought])


class HeldKeys(NamedTuple):
    """Evaluation keys in memory: ``parts`` as :func:`.kernel.rank` takes them, from token ``origin`` on."""

    parts: list[U8]
    origin: int
    bits: int


def evaluate(
    arena: Arena,
    item: Item,
    query_heads: int,
    reduction: Reduction,
    ranges: Ranges,
    keys: HeldKeys,
    layer: RowPlaces,
    most: int,
) -> tuple[Lacking, float]:
    """Quantise the query of ``item``, rank its tokens by ``keys``, hand the winners over: in one native call.

    As :func:`quantised_query`, :func:`.kernel.rank` and :func:`hand_over` do. Returns what is lacking, and
    the seconds that ranking took. Raises :class:`InvalidInput` as they do.
    """
    heads = len(ranges.scale)
    room = heads * item.k
    found, offsets = np.empty((2, room), np.int64), np.empty(room, np.uint64)
    checksums = np.empty(room, np.uint32)
    held, scores = item.held, item.scores
    outcome, (counts, total), scan_s = _native.evaluate(
        arena.content, item.query.offset, query_heads // heads, reduction is Reduction.sum,
        np.ascontiguousarray(ranges.scale), np.ascontiguousarray(ranges.zero),
        *code_and_threads(keys.parts), keys.parts, keys.bits, keys.origin,
        item.first_token, item.end_token, item.k,
        item.ids.offset, scores.offset if scores.length else None, held.offset, held.length // (4 * heads),
        layer.extents, layer.row_bytes, layer.tokens, layer.checksums, most, found, offsets, checksums,
    )  # fmt: skip
    if outcome == _OUTSIDE:
        raise InvalidInput("a region of the evaluation is not in the arena, or a row does not exist")
    if outcome == _NOT_FINITE:
        raise _not_finite()
    if outcome:
        raise InvalidInput(
            f"the keys in memory are not those of tokens {item.first_token} to {item.end_token}"
        )
    brought = min(total, most)
    lacking = Lacking(counts, found[0, :brought], found[1, :brought], offsets[:brought], checksums[:brought])
    return lacking, scan_s


def _not_finite() -> InvalidInput:
    return InvalidInput("the query contains NaN or infinity, or overflows float32 when scaled")
