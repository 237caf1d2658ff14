"""Between torch tensors and the storage arrays of rows (bfloat16 travels as its raw bits)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hillinfer_core.errors import UnsupportedModel
from hillinfer_core.layout import DType

_DTYPES = {torch.float16: DType.float16, torch.bfloat16: DType.bfloat16, torch.float32: DType.float32}


def row_dtype(dtype: torch.dtype) -> DType:
    """Return the row dtype of a KV tensor dtype; raises UnsupportedModel for others."""
    try:
        return _DTYPES[dtype]
    except KeyError:
        raise UnsupportedModel(
            f"KV of dtype {dtype} is not supported: use float16, bfloat16 or float32"
        ) from None


def to_storage(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the tensor as a numpy array of the storage dtype, on the host; shares memory where it can."""
    if tensor.dtype == torch.bfloat16:
        bits: np.ndarray[Any, Any] = tensor.contiguous().view(torch.int16).numpy(force=True).view(np.uint16)
        return bits
    array: np.ndarray[Any, Any] = tensor.numpy(force=True)
    return array


def to_rows(rows: np.ndarray[Any, Any], like: torch.Tensor) -> torch.Tensor:
    """Return storage rows as a tensor of `like`'s dtype and device; shares memory on the CPU."""
    if like.dtype == torch.bfloat16:
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16).to(like.device)
    return torch.from_numpy(rows).to(like.device)
