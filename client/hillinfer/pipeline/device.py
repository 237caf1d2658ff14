"""All that the pipeline does differently on an accelerator: a stream of its own, events, pinned memory.

On the CPU each of these is the plain operation. Nothing here synchronises a whole device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hillinfer.hkm import staging
from hillinfer.hkm.tensors import to_rows

Mark = Any
"""A point in the work of the model's stream; None on the CPU."""


class Uploaded(NamedTuple):
    """Rows [n, 2, D] on the model's device, there once `event` happened (None: already)."""

    rows: torch.Tensor
    event: Any

    def ready(self) -> torch.Tensor:
        """Return the rows for use on the current stream, which waits for them; the host does not."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.rows.device)
            stream.wait_event(self.event)
            self.rows.record_stream(stream)
        return self.rows


def to_host(tensor: torch.Tensor) -> Callable[[], npt.NDArray[np.float32]]:
    """Start copying to float32 on the host; the function returned waits for the copy, in any thread."""
    return staging.to_host(tensor.detach().float())


def mark(device: torch.device) -> Mark:
    """Note how far the model's stream is."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class SideStream:
    """The worker's stream. Used by one thread."""

    def __init__(self) -> None:
        self._stream: Any = None

    @contextmanager
    def following(self, mark: Mark, device: torch.device) -> Iterator[None]:
        """Work inside sees what the model's stream did before `mark`; without gradients."""
        with torch.no_grad():
            if device.type != "cuda":
                yield
                return
            self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(mark)
                yield

    def upload(self, rows: npt.NDArray[Any], like: torch.Tensor) -> Uploaded:
        """Start copying storage rows [n, 2, D] to the device of `like`, in its dtype."""
        if not like.is_cuda:
            return Uploaded(to_rows(rows, like), None)
        # The allocator of pinned memory keeps the buffer until the copy is done.
        pinned = to_rows(rows, like.new_empty(0, device="cpu")).pin_memory()
        copied = pinned.to(like.device, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return Uploaded(copied, event)
