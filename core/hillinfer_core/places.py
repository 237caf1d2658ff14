"""Which ids get, keep and lose a place in memory: in native code, all KV heads at once.

Calls release the GIL, may come from any thread, and do not block; several threads share the heads of much.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import _native, kernel
from .errors import InvalidInput
from .reference import U32

I64 = npt.NDArray[np.int64]
U16 = npt.NDArray[np.uint16]

_THREAD_BYTES = 64 << 10
"""Of ids, for each thread: 50 to 150 us of work, where waking one takes up to 40. Our choice."""
_COUNT_THREAD_BYTES = 16 << 10
"""As _THREAD_BYTES, of ids that are counted: none is near another."""


class Exchanged(NamedTuple):
    """What `exchange` did. Places count through all heads: head times slots, plus the slot."""

    missing_ids: U32
    """Wanted ids that were nowhere, head by head in the order in which they were wanted."""
    missing_places: I64
    """The slots given to them."""
    missing_counts: I64
    """How many of each head, [H]."""
    hot_slots: I64
    """The slots given to wanted ids that were in the hot pool."""
    hot_places: I64
    """Where these were there."""
    left_ids: U32
    """Ids that lost their slots, head by head."""
    left_places: I64
    """The slots that they had; others may have them now."""
    left_counts: I64
    """How many of each head, [H]."""


def exchange(slots: U32, hot: U32, wanted: U32, counts: I64, tokens: int) -> Exchanged:
    """Give each of the ``wanted`` ids a slot of its head, and take the slots of all others.

    ``slots`` uint32 [H, S] and ``hot`` uint32 [H, C] hold ids or 0xFFFFFFFF, C-contiguous, and are changed:
    what gets a slot is in the hot pool no more. ``wanted`` uint32 [n] has ``counts`` int64 [H] ids of each
    head, ascending in it and below ``tokens``. Raises :class:`InvalidInput` for others, and for more of a
    head than there are slots, after which slots and hot pool are of no further use.
    """
    heads, room = len(slots), max(len(wanted), slots.size)
    ids, places = np.empty((2, room), np.uint32), np.empty((4, room), np.int64)
    of_heads = np.empty((2, heads), np.int64)
    threads = kernel.few_threads(slots.nbytes + hot.nbytes, _THREAD_BYTES)
    found = _native.exchange(slots, hot, wanted, counts, tokens, threads, ids, places, of_heads)
    if found is None:
        _check(wanted, counts, heads, len(hot))
        if len(wanted) and int(wanted.max()) >= tokens:
            raise InvalidInput(f"token {wanted.max()} is wanted of a context of {tokens}")
        raise InvalidInput(
            f"more tokens are wanted of a KV head than its {slots.shape[1]} slots, or not in ascending order"
        )
    missing, in_hot, left = found
    return Exchanged(
        ids[0, :missing],
        places[0, :missing],
        of_heads[0],
        places[1, :in_hot],
        places[2, :in_hot],
        ids[1, :left],
        places[3, :left],
        of_heads[1],
    )


def keep(hot: U32, hits: U16, ids: U32, counts: I64) -> tuple[I64, I64]:
    """Put those of ``ids`` into the hot pool that have more hits than what they replace.

    ``hot`` uint32 [H, C], ids or 0xFFFFFFFF, is changed. ``hits`` uint16 [H, T] are of the tokens 0 to T-1;
    others have none. ``ids`` uint32 [n], ``counts`` int64 [H] of each head. The one with most hits is
    compared with the one with fewest, the next with the next; equals stay in their order, and a free place
    has fewer than any. Returns which of ``ids``, int64 [m], and their places, counted through all heads.
    """
    found = np.empty((2, len(ids)), np.int64)
    threads = kernel.few_threads(hot.nbytes + ids.nbytes, _THREAD_BYTES)
    kept = _native.keep(hot, hits, ids, counts, threads, found[0], found[1])
    if kept is None:
        _check(ids, counts, len(hits), len(hot))
    return found[0, :kept], found[1, :kept]


def count_hits(hits: U16, ids: U32, counts: I64, hit: int, most: int) -> None:
    """Add ``hit`` to what ``hits`` uint16 [H, T] has for ``ids`` uint32 [n], up to ``most``.

    ``counts`` int64 [H] are of each head. Raises :class:`InvalidInput` for others, and ids of T or more.
    """
    threads = kernel.few_threads(ids.nbytes, _COUNT_THREAD_BYTES)
    if not _native.count_hits(hits, ids, counts, hit, most, threads):
        _check(ids, counts, len(hits), len(hits))
        raise InvalidInput(f"token {ids.max()} was selected of a context of {hits.shape[1]}")


def _check(ids: U32, counts: I64, heads: int, others: int) -> None:
    if others != heads or len(counts) != heads or counts.sum() != len(ids) or (counts < 0).any():
        raise InvalidInput(f"{len(ids)} ids of {len(counts)} KV heads for places of {heads} and of {others}")
