"""Attention of a decode step in native code, in the thread that asks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import _native
from .errors import InvalidInput
from .kernel import FORMATS, variant
from .reference import F32


def attend(query: F32, keys: npt.NDArray[Any], values: npt.NDArray[Any], scaling: float) -> F32:
    """Attend ``query`` float32 [H, G, D] to ``keys`` and ``values`` [H, N, D]: float32 [H, G, D].

    G query heads share a KV head. The output is softmax(scaling * query keys^T) values, with sums of float32.
    keys and values are float16, uint16 (the bits of bfloat16) or float32. All are C-contiguous, and H, G, N
    and D at least 1. Releases the GIL; from any thread. Raises :class:`InvalidInput` for others.
    """
    out = np.empty_like(query)
    kind = FORMATS.get(keys.dtype) if keys.dtype == values.dtype else None
    if (
        kind is None
        or not (keys.flags.c_contiguous and values.flags.c_contiguous)
        or not _native.attend(
            variant(), kind, query, keys.view(np.uint8), values.view(np.uint8), scaling, out
        )
    ):
        raise InvalidInput(
            f"cannot attend {list(query.shape)} to keys {list(keys.shape)} of {keys.dtype} and values "
            f"{list(values.shape)} of {values.dtype}"
        )
    return out
