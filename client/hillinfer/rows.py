"""Keys and values as an application gives them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import DType, Shape

Array = npt.NDArray[Any]

# IEEE exponent bits of a bfloat16: all ones is an infinity or a NaN.
_BF16_EXPONENT = 0x7F80


def storage_rows(shape: Shape, array: Array, name: str) -> Array:
    """Return `array` [kv_heads, n, head_dim] in the storage dtype; bfloat16 becomes its bits.

    Raises `InvalidInput`, naming it `name`, for another shape or dtype.
    """
    dtype = shape.dtype
    if array.dtype.name == "bfloat16" and dtype is DType.bfloat16:
        array = array.view(np.uint16)
    if array.dtype != dtype.storage:
        raise InvalidInput(f"{name} must be {dtype.value} (held as {dtype.storage}), not {array.dtype}")
    if array.ndim != 3 or (array.shape[0], array.shape[2]) != (shape.kv_heads, shape.head_dim):
        raise InvalidInput(f"{name} must be [{shape.kv_heads}, n, {shape.head_dim}], not {list(array.shape)}")
    return array


def check_finite(shape: Shape, array: Array) -> None:
    """Raise `InvalidInput` unless every number is."""
    if shape.dtype is DType.bfloat16:
        finite = bool(np.all((array & _BF16_EXPONENT) != _BF16_EXPONENT))
    else:
        finite = bool(np.isfinite(array).all())
    if not finite:
        raise InvalidInput("keys and values must be finite; found a NaN or an infinity")
