"""Moving rows in the host's memory: in native code, each copied once, all KV heads together.

Slots have keys and values apart, ``keys`` and ``values`` [H, N, D]. ``pinned`` begin each head; places count
the others through all heads. Elsewhere a row is a key and its value, [n, 2, D]. All arrays are of one dtype
and C-contiguous; none of them is both read and written. No place is given twice. Calls release the GIL, may
come from any thread, and do not block; several threads share what is much. They raise
:class:`InvalidInput` for arrays that do not fit and places that do not exist, before anything has moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from . import _native, kernel
from .errors import InvalidInput
from .places import U16
from .reference import U8, U32

I64 = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

_THREAD_BYTES = 512 << 10
"""Of rows, for each thread. Our choice: as of those that the daemon copies (transfers.cpp)."""
_PROCESSORS = 2
"""For each thread: on two, a second one copied nothing sooner, as one has all of memory's rate there."""


class SlotArrays(NamedTuple):
    """Slots of one sequence as `turn_over` takes them: views."""

    ids: U32
    keys: U8
    values: U8
    pinned: int

    @classmethod
    def of(cls, ids: U32, keys: Array, values: Array, pinned: int) -> Self:
        """Views of ids uint32 [H, S] (see `places.exchange`), keys and values [H, pinned + S, D]."""
        _require(keys.dtype == values.dtype, "keys and values")
        return cls(ids, _bytes(keys), _bytes(values), pinned)


class HotArrays(NamedTuple):
    """The hot pool of one sequence as `turn_over` takes it: views."""

    ids: U32
    hits: U16
    rows: U8

    @classmethod
    def of(cls, ids: U32, hits: U16, rows: Array) -> Self:
        """Views of ids uint32 [H, C], hits uint16 [H, T] (see `places.keep`), and rows [H * C, 2, D]."""
        return cls(ids, hits, _rows(rows))


def turn_over(
    slots: SlotArrays,
    hot: HotArrays,
    wanted: U32,
    tokens: int,
    missing: Sequence[int],
    rows: Array,
    hit: int,
    *,
    halve: bool,
) -> bool:
    """Select ``wanted`` uint32 [H, k], ascending in each head and below ``tokens``: all of it in one call.

    As `places.count_hits` by ``hit`` up to 65,535, after which all hits are halved if ``halve``,
    `places.exchange` and `places.keep` of what lost its slot, and rows move accordingly: ``rows``
    [n, 2, D] are what slots and hot pool lack, ``missing`` of each head, head by head and ascending. Without
    places in the hot pool nothing is counted. False, with both of no further use, where others are lacking,
    and where ids do not ascend. Raises
    :class:`InvalidInput` for ids beyond, and more of them than slots, before anything has changed.
    """
    done = _native.turn_over(*slots, *hot, wanted, tokens, missing, rows, hit, halve)
    if done is None:
        if wanted.size and int(wanted.max()) >= tokens:
            raise InvalidInput(f"token {wanted.max()} is wanted of a context of {tokens}")
        raise InvalidInput(
            f"ids {list(wanted.shape)} and rows {list(rows.shape)} of {rows.dtype} do not fit slots "
            f"{list(slots.ids.shape)} and hits {list(hot.hits.shape)}"
        )
    return done


def put_tokens(keys: Array, values: Array, new_keys: Array, new_values: Array, places: Sequence[int]) -> None:
    """Put one token of each sequence, [B, H, 1, D], to its sequence's place in each head of [B, H, N, D]."""
    new = np.ascontiguousarray(new_keys), np.ascontiguousarray(new_values)
    if not _native.put_tokens(keys, values, *new, places):
        raise InvalidInput(
            f"tokens {list(new_keys.shape)} of {new_keys.dtype} do not fit places {list(places)} in "
            f"{list(keys.shape)} of {keys.dtype}"
        )


def join_rows(keys: Array, values: Array, pinned: int, places: I64) -> Array:
    """Return the rows [n, 2, D] of the slots ``places`` int64 [n]: a copy."""
    _require(keys.shape == values.shape and keys.ndim == 3 and values.dtype == keys.dtype, "keys and values")
    out = np.empty((len(places), 2, keys.shape[2]), keys.dtype)
    if len(places):
        threads = kernel.few_threads(out.nbytes, _THREAD_BYTES, _PROCESSORS)
        _moved(_native.join_rows(_bytes(keys), _bytes(values), pinned, places, threads, _rows(out)))
    return out


def split_rows(
    rows: Array, keys: Array, values: Array, pinned: int, places: I64, which: I64 | None = None
) -> None:
    """Put those of ``rows`` [m, 2, D] that ``which`` int64 [n] counts into slots ``places`` int64 [n].

    Without it, all of them in turn.
    """
    _require(keys.shape == values.shape and keys.ndim == 3, "keys and values")
    _require(rows.dtype == keys.dtype == values.dtype and rows.shape[1:] == (2, keys.shape[2]), "rows")
    _require(len(places) == len(rows if which is None else which), "places")
    if len(places):
        threads = kernel.few_threads(len(places) * rows[:1].nbytes, _THREAD_BYTES, _PROCESSORS)
        _moved(_native.split_rows(_rows(rows), which, _bytes(keys), _bytes(values), pinned, places, threads))


def put_rows(rows: Array, which: I64 | None, out: Array, places: I64 | None) -> None:
    """Put those of ``rows`` [m, 2, D] that ``which`` int64 [n] counts to ``places`` int64 [n] of ``out``.

    None is for the first, in turn: of all ``rows``, or of places.
    """
    _require(rows.dtype == out.dtype and rows.shape[1:] == out.shape[1:], "rows")
    count = len(rows if which is None else which)
    _require(places is None or count == len(places), "places")
    if count:
        threads = kernel.few_threads(count * rows[:1].nbytes, _THREAD_BYTES, _PROCESSORS)
        _moved(_native.put_rows(_rows(rows), which, _rows(out), places, threads))


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
