"""Copies of evaluation keys, for those who rank themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hillinfer_core import kernel
from hillinfer_core.errors import CorruptData, InvalidInput
from hillinfer_core.layout import PAGE, TILE_TOKENS
from hillinfer_core.v1 import cold_pool_pb2

if TYPE_CHECKING:
    from hillinfer.context import Context

_KEY_PIECE = 8 << 20  # bytes of evaluation keys that the daemon brings at once


@dataclass(frozen=True, slots=True)
class MirroredKeys:
    """A copy of evaluation keys."""

    tiles: npt.NDArray[np.uint8]
    """uint8 [kv_heads, tokens / 16, tile bytes] (`hillinfer_core.layout`)."""
    scale: npt.NDArray[np.float32]
    """float32 [kv_heads, head_dim]: of the ranges they were made with; queries are quantised with it."""
    generation: int
    """Of the layer's evaluation keys; as in `Brought`."""


def fetch_keys(context: Context, layer: int, first: int, end: int) -> MirroredKeys:
    """See `Context.fetch_keys`."""
    flushed = context.flushed(layer)
    if not 0 <= first < end <= flushed or first % TILE_TOKENS or end % TILE_TOKENS:
        raise InvalidInput(
            f"cannot fetch keys of tokens {first} to {end}: give whole tiles of {TILE_TOKENS} tokens of "
            f"the {flushed} flushed"
        )
    shape = context.shape
    tiles = np.empty((shape.kv_heads, (end - first) // TILE_TOKENS, shape.key_tile_bytes), np.uint8)
    with context.session.lock:
        # One writer, and it holds the lock: no append changes the ranges between the pieces.
        staging = context.session.staging()
        room = min(_KEY_PIECE, staging.nbytes - PAGE - 4 * shape.kv_heads * shape.head_dim)
        piece = max(1, room // (shape.kv_heads * shape.key_tile_bytes))
        for at in range(0, tiles.shape[1], piece):
            part = tiles[:, at : at + piece]
            staging.reset()
            region, arrived = staging.take(part.shape, np.uint8)
            scales_region, scales = staging.take((shape.kv_heads, shape.head_dim), np.float32)
            start = first + at * TILE_TOKENS
            which = cold_pool_pb2.KeyRange(
                first_token=start, end_token=start + part.shape[1] * TILE_TOKENS, scales=scales_region
            )
            answer = context.fetch_into(layer, region, keys=which)
            part[...] = arrived
            if kernel.data_checksums(part).tolist() != list(answer.key_checksums):
                raise CorruptData("evaluation keys are not as the daemon sent them; connect a new session")
            scale = scales.copy()
    return MirroredKeys(tiles, scale, answer.generation)
