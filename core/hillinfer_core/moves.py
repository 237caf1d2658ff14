"""Moving rows in the host's memory: in native code, each copied once, all KV heads together.

Slots have keys and values apart, ``keys`` and ``values`` [H, N, D]. ``pinned`` begin each head; places count
the others through all heads. Elsewhere a row is a key and its value, [n, 2, D]. All arrays are of one dtype
and C-contiguous. Calls release the GIL, may come from any thread, and do not block. They raise
:class:`InvalidInput` for arrays that do not fit and places that do not exist, before anything has moved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import _native
from .errors import InvalidInput
from .places import exchange
from .reference import U8, U32

I64 = npt.NDArray[np.int64]
Array = npt.NDArray[Any]


class Moved(NamedTuple):
    """What `exchange_rows` did: as `places.Exchanged`, with the rows [n, 2, D] of what lost its slot."""

    missing_ids: U32
    missing_places: I64
    missing_counts: I64
    left_ids: U32
    left_counts: I64
    left_rows: Any


def exchange_rows(
    slots: U32,
    hot: U32,
    wanted: U32,
    counts: I64,
    tokens: int,
    keys: Array,
    values: Array,
    pinned: int,
    hot_rows: Array,
) -> Moved:
    """Do what `places.exchange` does, and move rows accordingly, in one call.

    keys and values are [H, pinned + S, D], hot_rows [H * C, 2, D] of the hot pool's places. Of a pool without
    places no rows are returned, and no ids that lost their slots. Raises as `places.exchange`.
    """
    _require(keys.dtype == values.dtype == hot_rows.dtype, "keys and values")
    heads, room, keep = len(slots), max(len(wanted), slots.size), bool(hot.size)
    ids, places = np.empty((2, room), np.uint32), np.empty((4, room), np.int64)
    of_heads = np.empty((2, heads), np.int64)
    found = _native.exchange_rows(
        slots, hot, wanted, counts, tokens, ids, places, of_heads,
        _bytes(keys), _bytes(values), pinned, _rows(hot_rows), keep,
    )  # fmt: skip
    if found is None:
        exchange(slots, hot, wanted, counts, tokens)  # says what is wrong with ids
        _require(False, "keys and values")
    assert found is not None
    missing, left, rows = found
    return Moved(
        ids[0, :missing],
        places[0, :missing],
        of_heads[0],
        ids[1, : left if keep else 0],
        of_heads[1],
        rows.view(keys.dtype).reshape(-1, 2, keys.shape[2]),
    )


def join_rows(keys: Array, values: Array, pinned: int, places: I64) -> Array:
    """Return the rows [n, 2, D] of the slots ``places`` int64 [n]: a copy."""
    _require(keys.shape == values.shape and keys.ndim == 3 and values.dtype == keys.dtype, "keys and values")
    out = np.empty((len(places), 2, keys.shape[2]), keys.dtype)
    if len(places):
        _moved(_native.join_rows(_bytes(keys), _bytes(values), pinned, places, _rows(out)))
    return out


def split_rows(rows: Array, which: I64 | None, keys: Array, values: Array, pinned: int, places: I64) -> None:
    """Put ``rows`` [m, 2, D], or those that ``which`` int64 [n] counts, into slots ``places`` int64 [n]."""
    _require(keys.shape == values.shape and keys.ndim == 3, "keys and values")
    _require(rows.dtype == keys.dtype == values.dtype and rows.shape[1:] == (2, keys.shape[2]), "rows")
    _require(len(places) == len(rows if which is None else which), "places")
    if len(places):
        _moved(_native.split_rows(_rows(rows), which, _bytes(keys), _bytes(values), pinned, places))


def put_rows(rows: Array, which: I64, out: Array, places: I64) -> None:
    """Put those of ``rows`` [m, 2, D] that ``which`` int64 [n] counts to ``places`` int64 [n] of ``out``."""
    _require(rows.dtype == out.dtype and rows.shape[1:] == out.shape[1:], "rows")
    _require(len(which) == len(places), "places")
    if len(places):
        _moved(_native.put_rows(_rows(rows), which, _rows(out), places))


def _rows(rows: Array) -> U8:
    return _bytes(rows).reshape(len(rows), rows.shape[1] * rows.shape[2] * rows.itemsize)


def _bytes(array: Array) -> U8:
    _require(array.flags.c_contiguous, "memory layouts")
    return array.view(np.uint8)


def _moved(done: bool) -> None:
    if not done:
        raise InvalidInput("a row is to be moved from or to a place that does not exist")


def _require(held: bool, what: str) -> None:
    if not held:
        raise InvalidInput(f"{what} of rows to be moved do not fit")
