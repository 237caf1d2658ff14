"""Attention of a decode step in native code, in the thread that asks."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from . import _native
from .errors import InvalidInput
from .kernel import FORMATS, variant
from .reference import F32, U8


class Attended(NamedTuple):
    """Keys and values as `attend` takes them: views."""

    format: int
    keys: U8
    values: U8

    @classmethod
    def of(cls, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> Self:
        """Both [H, N, D], C-contiguous, float16, uint16 (bits of bfloat16) or float32; else InvalidInput."""
        kind = FORMATS.get(keys.dtype) if keys.dtype == values.dtype else None
        if kind is None or not (keys.flags.c_contiguous and values.flags.c_contiguous):
            raise InvalidInput(
                f"cannot attend to keys {list(keys.shape)} of {keys.dtype} and values {list(values.shape)} "
                f"of {values.dtype}"
            )
        return cls(kind, keys.view(np.uint8), values.view(np.uint8))


def attend(query: F32, attended: Attended, scaling: float) -> F32:
    """Attend ``query`` float32 [H, G, D] to keys and values [H, N, D]: float32 [H, G, D].

    G query heads share a KV head. The output is softmax(scaling * query keys^T) values, with sums of float32.
    All are C-contiguous, and H, G, N and D at least 1. Releases the GIL; from any thread. Raises
    :class:`InvalidInput` for others.
    """
    out = np.empty_like(query)
    if not _native.attend(variant(), *attended, query, scaling, out):
        raise InvalidInput(
            f"cannot attend {list(query.shape)} to keys of {list(attended.keys.shape)} bytes and values of "
            f"{list(attended.values.shape)}"
        )
    return out
