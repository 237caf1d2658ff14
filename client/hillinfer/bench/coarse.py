"""A coarse first pass before a ranking: only tokens of the tiles that look best are ranked. Measured only.

What is kept of a tile of keys is two vectors. *bounds*: the least and the greatest of each channel, which
bound every product (Quest, Tang et al., 2024, section 3.3). *spread*: their mean and standard deviation; a
tile's score is the product with the mean and twice what the deviations add, were channels independent (our
choice).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from hillinfer_core.layout import TILE_TOKENS

F32 = npt.NDArray[np.float32]

PARTS = (2, 4, 8)
"""One tile in so many is kept."""


def screened(keys: F32, queries: F32) -> Iterator[tuple[str, int, npt.NDArray[np.bool_]]]:
    """Yield (way, part, kept): bool [Hkv, queries, n], the tokens ranked where one tile in `part` is.

    keys: [Hkv, n, D]; queries: [Hkv, queries, D], summed over the heads of a group. The last tile may be
    short.
    """
    tokens = keys.shape[1]
    starts = np.arange(0, tokens, TILE_TOKENS)
    sizes = np.diff(np.append(starts, tokens))
    for way, scores in (
        ("bounds", _by_bounds(keys, queries, starts)),
        ("spread", _by_spread(keys, queries, starts)),
    ):
        order = np.argsort(-scores, axis=-1, kind="stable")
        for part in PARTS:
            kept = np.zeros(scores.shape, bool)
            np.put_along_axis(kept, order[..., : -(-len(starts) // part)], True, axis=-1)
            yield way, part, np.repeat(kept, sizes, axis=-1)


def _by_bounds(keys: F32, queries: F32, starts: npt.NDArray[np.int64]) -> F32:
    low, high = np.minimum.reduceat(keys, starts, axis=1), np.maximum.reduceat(keys, starts, axis=1)
    return _products(high, np.maximum(queries, 0)) + _products(low, np.minimum(queries, 0))


def _by_spread(keys: F32, queries: F32, starts: npt.NDArray[np.int64]) -> F32:
    count = np.diff(np.append(starts, keys.shape[1]))[:, None]
    mean: F32 = np.divide(np.add.reduceat(keys, starts, axis=1), count, dtype=np.float32)
    square: F32 = np.divide(np.add.reduceat(keys * keys, starts, axis=1), count, dtype=np.float32)
    variance: F32 = np.maximum(square - mean * mean, 0)
    scores: F32 = _products(mean, queries) + 2 * np.sqrt(_products(variance, queries * queries))
    return scores


def _products(tiles: F32, queries: F32) -> F32:
    products: F32 = np.einsum("htd,hqd->hqt", tiles, queries)
    return products
