"""Reading rows back from the drive, every one held to its checksum."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hillinfer_core import kernel
from hillinfer_core.errors import CorruptData
from hillinfer_core.exchange import Lacking
from hillinfer_core.reference import U32

from ..driver.contract import Driver
from .store import Heads, LayerStore, Rows, Tokens


def gather(
    driver: Driver, store: LayerStore, heads: Heads, tokens: Tokens, out: npt.NDArray[np.uint8]
) -> int:
    """Bring the rows of ``heads`` [n] and ``tokens`` [n] to ``out`` uint8 [n, row bytes]; return bytes read.

    Raises :class:`CorruptData` if a row does not match its checksum.
    """
    return bring(driver, Lacking([], heads, tokens, *store.locate(heads, tokens)), out)


def bring(driver: Driver, lacking: Lacking, out: npt.NDArray[np.uint8]) -> int:
    """As :func:`gather`, of rows that were located."""
    if len(lacking.ids) == 0:
        return 0
    read = driver.gather(lacking.offsets, out)
    _verify(lacking.checksums, lacking.heads, lacking.ids, out)
    return read


def read_range(
    driver: Driver, store: LayerStore, first: int, count: int, out: Rows | None = None
) -> tuple[Rows, int]:
    """Bring tokens ``first .. first + count - 1`` of every head; return (rows [H, count, 2, D], bytes read).

    ``out`` receives them if given; its heads may lie apart. Raises :class:`CorruptData` if a row does not
    match its checksum.
    """
    shape = store.shape
    if out is None:
        out = np.empty((shape.kv_heads, count, 2, shape.head_dim), shape.dtype.storage)
    # Never a copy: the tokens of a head lie together.
    flat = out.reshape(shape.kv_heads, count * shape.row_bytes // out.itemsize).view(np.uint8)
    assert np.shares_memory(flat, out)
    parts = []
    for placed, low, high in store.runs(first, first + count):
        part = slice((low - first) * shape.row_bytes, (high - first) * shape.row_bytes)
        for head in range(shape.kv_heads):
            offset = placed.row_offset(head, low, shape.row_bytes)
            parts.append((offset, flat[head, part].data))
    total = driver.read_ranges(parts)
    heads = np.repeat(np.arange(shape.kv_heads), count)
    tokens = np.tile(np.arange(first, first + count), shape.kv_heads)
    _verify(store.locate(heads, tokens)[1], heads, tokens, flat.reshape(-1, shape.row_bytes))
    return out, total


def _verify(checksums: U32, heads: Heads, tokens: Tokens, out: npt.NDArray[np.uint8]) -> None:
    first = kernel.damaged_row(out, checksums)
    if first is not None:
        raise CorruptData(
            f"of {len(tokens)} rows read back, that of token {tokens[first]} of head {heads[first]} is the "
            "first that is damaged; close the context, fill a new one, and check the drive"
        )
