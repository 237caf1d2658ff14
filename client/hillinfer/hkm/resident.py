"""How the `resident` budget is divided, and what is held."""

from __future__ import annotations

from dataclasses import dataclass

from hillinfer_core.errors import ResidentTooSmall
from hillinfer_core.units import format_bytes


@dataclass(frozen=True)
class Division:
    """What the rest of the budget buys.

    keep_slots: whether selected tokens stay in their slots between steps; if
        not, a layer's selection lives only while that layer computes.
    fits: whether one layer's selection does at all; if not, everything is attended to, a block at a time.
    hot_rows: rows of the hot pool, for each layer, sequence and KV head.
    """

    keep_slots: bool
    hot_rows: int
    fits: bool = True


def divide(
    limit: int, fixed: int, slot_bytes: int, layer_bytes: int, row_bytes: int, streams: int
) -> Division:
    """Divide `limit` bytes: first what must be held, then slots, then hot pool.

    fixed: evaluation keys, checksums, arena, tail buffers, pinned slots;
    slot_bytes: the selected tokens' slots of all layers, and the hit counters
    that come with keeping them; layer_bytes: the slots of one layer; row_bytes: one row with its id;
    streams: layers x sequences x KV heads.
    Raises ResidentTooSmall when `fixed` alone does not fit.
    """
    left = limit - fixed
    if left < 0:
        raise ResidentTooSmall(
            f"this context needs {format_bytes(fixed)} for evaluation keys, checksums, buffers and windows, "
            f"but resident is {format_bytes(limit)}; raise resident, or use INT4 evaluation keys"
        )
    if slot_bytes > left:
        return Division(keep_slots=False, hot_rows=0, fits=layer_bytes <= left)
    return Division(keep_slots=True, hot_rows=(left - slot_bytes) // (row_bytes * streams))
