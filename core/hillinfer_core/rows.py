"""Where rows lie: in native code, over all KV heads at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import _native
from .errors import InvalidInput
from .reference import U32

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


class RowPlaces(NamedTuple):
    """Where the rows of a layer of ``tokens`` tokens lie.

    ``extents`` int64 [3, E], in ascending order, are (first token, tokens of a head, byte offset);
    ``checksums`` are uint32 [H, at least tokens], and only their heads may lie apart.
    """

    extents: I64
    row_bytes: int
    tokens: int
    checksums: U32


def locate(layer: RowPlaces, heads: I64, ids: I64) -> tuple[U64, U32]:
    """Return where rows of ``heads`` int64 [n] and ``ids`` int64 [n] lie, uint64 [n], and their checksums.

    The checksums are uint32 [n]. Raises :class:`InvalidInput` for a row that does not exist.
    """
    offsets, sums = np.empty(len(ids), np.uint64), np.empty(len(ids), np.uint32)
    if not _native.locate(
        layer.extents, layer.row_bytes, layer.tokens, layer.checksums, heads, ids, offsets, sums
    ):
        raise InvalidInput(
            f"a row does not exist: the layer holds {layer.tokens} tokens of {len(layer.checksums)} heads"
        )
    return offsets, sums
