"""The self-test of a bitstream: a few small runs that must agree with the reference to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hillinfer_core import reference
from hillinfer_core.errors import BadBitstream
from hillinfer_core.layout import TILE_TOKENS, tile_bytes

from .configurable import Configurable, Outcome, Vector
from .configurations import Configuration

TOKENS = 1000
"""Tokens of a vector: more than a page of keys and a ragged end, over in no time. Our choice."""


def self_test(card: Configurable, kernel: Configuration, head_dims: tuple[int, ...]) -> None:
    """Run ``kernel`` at every head dimension; raises :class:`BadBitstream` if a result is wrong."""
    for vector in vectors(kernel, head_dims):
        if not card.run_vector(kernel.name, vector).same(expected(vector)):
            raise BadBitstream(
                f"{kernel.name} does not compute what it should at head dimension {vector.q.shape[2]}: "
                "its self-test differs from the reference; build the bitstream again"
            )


def vectors(kernel: Configuration, head_dims: tuple[int, ...]) -> Iterator[Vector]:
    """Yield the vectors: random keys, one and several query vectors, and many equal scores."""
    dtype = np.int8 if kernel.query_bits == 8 else np.int16
    limit = int(np.iinfo(dtype).max)
    for dim in head_dims:
        rng = np.random.default_rng(dim)
        shape = (2, -(-TOKENS // TILE_TOKENS), tile_bytes(dim, kernel.precision))
        tiles = rng.integers(0, 256, shape, np.uint8)
        for count, first_id in ((1, 0), (3, 1 << 20)):
            q = rng.integers(-limit, limit + 1, (2, count, dim)).astype(dtype)
            # Only 8-bit queries have offsets: of the size of the scores, so that each vector wins some.
            spread = limit * kernel.precision.levels * (count > 1 and kernel.query_bits == 8)
            offsets = rng.integers(-spread, 1, (2, count)).astype(np.int32)
            yield Vector(kernel.precision, tiles, q, offsets, 21, TOKENS, 100, first_id)
        q = np.zeros((2, 1, dim), dtype)
        q[:, :, 0] = 1
        none = np.zeros((2, 1), np.int32)
        yield Vector(kernel.precision, tiles & np.uint8(0x11), q, none, 0, TOKENS - 30, 333, 0)


def expected(vector: Vector) -> Outcome:
    """Return what the reference gives for ``vector``."""
    levels = reference.from_tiles(vector.tiles, vector.precision).astype(np.int64)
    # Wide, as the reference's own scores take no INT16 query; none of them leaves INT32 (docs/evaluation.md).
    products = np.einsum("htd,hrd->htr", levels, vector.q.astype(np.int64)) + vector.offsets[:, None, :]
    scores = products.max(axis=2).astype(np.int32)
    scanned = np.ascontiguousarray(scores[:, vector.begin : vector.end])
    ids, best = reference.top_k(scanned, vector.k, vector.first_id + vector.begin)
    counts = reference.histogram(scanned, vector.q, vector.precision, offsets=vector.offsets)
    return Outcome(ids, best, counts, reference.data_checksum(vector.tiles))
