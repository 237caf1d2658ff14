"""Between the host and an accelerator: several arrays in one transfer, a copy back that is waited for late.

On the CPU both are plain copies. Nothing here waits for the device but the function that `to_host` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hillinfer.hkm.tensors import to_storage
from hillinfer_core.moves import put_rows

_ALIGNED = 16  # bytes: of what the device reads at once


def on_accelerator(tensor: torch.Tensor) -> bool:
    """Whether it is where the host cannot reach it."""
    return tensor.device.type != "cpu"


class Rows(NamedTuple):
    """Those of `rows` [m, 2, D] that `which` int64 [n] counts; all of them without it."""

    rows: npt.NDArray[Any]
    which: npt.NDArray[np.int64] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of those."""
        count = len(self.rows if self.which is None else self.which)
        return count * self.rows[:1].nbytes

    def copy_to(self, memory: npt.NDArray[np.uint8]) -> None:
        """Copy them to uint8 [nbytes]."""
        out = memory.view(self.rows.dtype).reshape(-1, *self.rows.shape[1:])
        put_rows(np.ascontiguousarray(self.rows), self.which, out, None)


def to_device(
    groups: Sequence[Sequence[npt.NDArray[Any] | Rows]], device: torch.device
) -> list[torch.Tensor]:
    """Start copying groups of C-contiguous arrays and rows to the device, each with no gap between them.

    Returns uint8 [bytes] for each group, there in stream order; the arrays may change meanwhile. All take
    one transfer, which takes longer to begin than to copy what a step moves, through pinned memory, which
    torch keeps until it is done, and then for the next.
    """
    sizes = [sum(each.nbytes for each in group) for group in groups]
    starts = [0, *accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]
    staged = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    memory = staged.numpy()
    for group, start in zip(groups, starts, strict=False):
        for each in group:
            there = memory[start : start + each.nbytes]
            if isinstance(each, Rows):
                each.copy_to(there)
            else:
                there[:] = each.reshape(-1).view(np.uint8)
            start += each.nbytes
    copied = staged.to(device, non_blocking=True)
    return [copied[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def to_host(tensor: torch.Tensor) -> Callable[[], npt.NDArray[Any]]:
    """Start copying a tensor to the host; the function returned waits for it, in any thread.

    It returns an array of the storage dtype.
    """
    tensor = tensor.detach()
    if not tensor.is_cuda:
        copied = to_storage(tensor)
        return lambda: copied
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
    done.record(torch.cuda.current_stream(tensor.device))

    def wait() -> npt.NDArray[Any]:
        done.synchronize()
        return to_storage(pinned)

    return wait
