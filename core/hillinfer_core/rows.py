"""Which rows are wanted, and where they lie: in native code, over all KV heads at once. Neither blocks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from . import _native
from .errors import InvalidInput
from .reference import U32

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


def missing(ids: U32, held: U32, end: int) -> tuple[U32, I64, I64]:
    """Return the ``ids`` uint32 [H, k] that are not among ``held`` uint32 [H, S] of the same KV head.

    The result is (how many of each head, uint32 [H]; their heads, int64 [n]; the ids, int64 [n]), head by
    head in the order of ``ids``. Ids are below ``end``; what is held from ``end`` on stands for no token.
    Both are C-contiguous.
    """
    heads, k = ids.shape
    if held.shape[0] != heads or not 0 <= end < 1 << 32:
        raise InvalidInput(f"held ids of {held.shape[0]} KV heads for {heads}, of tokens below {end}")
    counts = np.empty(heads, np.uint32)
    places = np.empty((2, heads * k), np.int64)
    found = _native.missing(ids, held, end, counts, places[0], places[1])
    return counts, places[0, :found], places[1, :found]


def locate(
    extents: I64, row_bytes: int, tokens: int, checksums: U32, heads: I64, ids: I64
) -> tuple[U64, U32]:
    """Return where rows lie, uint64 [n], and their checksums, uint32 [n].

    The rows are those of ``heads`` int64 [n] and ``ids`` int64 [n] of a layer of ``tokens`` tokens. Its
    ``extents`` int64 [3, E], in ascending order, are (first token, tokens of a head, byte offset); its
    ``checksums`` are uint32 [H, at least tokens]. Raises :class:`InvalidInput` for a row that does not exist.
    """
    offsets, sums = np.empty(len(ids), np.uint64), np.empty(len(ids), np.uint32)
    if not _native.locate(extents, row_bytes, tokens, checksums, heads, ids, offsets, sums):
        raise InvalidInput(f"a row does not exist: the layer holds {tokens} tokens of {len(checksums)} heads")
    return offsets, sums
