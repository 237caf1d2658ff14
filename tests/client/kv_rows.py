"""Random keys and values in the storage dtype of a shape, and the arithmetic that ranks them."""

from __future__ import annotations

from typing import Any

import numpy as np

from hillinfer import DType, Reduction, Shape
from hillinfer_core import reference


def random_kv(shape: Shape, tokens: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Keys and values, [kv_heads, tokens, head_dim] each."""
    numbers = np.random.default_rng(seed).standard_normal((2, shape.kv_heads, tokens, shape.head_dim))
    if shape.dtype is DType.bfloat16:
        stored = (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        stored = numbers.astype(shape.dtype.storage)
    return stored[0], stored[1]


def random_query(heads: int, head_dim: int, seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((heads, head_dim)).astype(np.float32)


def as_float32(shape: Shape, stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if shape.dtype is DType.bfloat16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def expected_selection(
    shape: Shape,
    keys: np.ndarray[Any, Any],
    query: np.ndarray[Any, Any],
    k: int,
    first: int,
    end: int,
    reduction: Reduction = Reduction.sum,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Ids and scores as the numpy reference has them, for ranges fitted on all of `keys`."""
    ranges = reference.fit_ranges(as_float32(shape, keys), shape.precision)
    rows = np.stack([keys, keys], axis=2)
    tiles = reference.quantise_keys(rows, ranges, shape.precision)[0]
    quantised, offsets, _ = reference.quantise_query(query, ranges, reduction)
    scores = np.empty((shape.kv_heads, keys.shape[1]), np.int32)
    reference.scores(tiles, quantised, shape.precision, scores, offsets=offsets)
    ids, best = reference.top_k(np.ascontiguousarray(scores[:, first:end]), k, first)
    return ids, best
