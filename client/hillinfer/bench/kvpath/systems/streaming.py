"""Reading a layer from the drive piece by piece, the next while the last is worked on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy.typing as npt

from hillinfer.context import Context
from hillinfer_core.layout import PAGE
from hillinfer_core.v1 import cold_pool_pb2

COMMAND_BYTES = 128 << 10
"""What an NVMe command of the card takes at most (../../../../../docs/smartssd.md)."""

_BUFFERS = 2


class Stream:
    """Rows of a context's layers in order, through two parts of the session's arena. One user at a time."""

    def __init__(self, context: Context, *, owned: bool = True) -> None:
        self.ios = 0
        """Requests of `COMMAND_BYTES` so far."""
        self._context = context
        self._owned = owned
        self._ahead = ThreadPoolExecutor(1, "hillinfer-kvpath-stream")

    def pieces(self, layer: int, tokens: int, start: int = 0) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Yield (first token, rows [kv_heads, n, 2, row_dim]), valid until the next is asked for.

        start: the token that the first piece begins with.
        Nobody else may use the arena meanwhile.
        """
        if start >= tokens:
            return
        shape, staging = self._context.shape, self._context.session.staging()
        staging.reset()
        per_token = shape.kv_heads * shape.row_bytes
        size = min(tokens - start, (staging.nbytes - _BUFFERS * PAGE) // _BUFFERS // per_token)
        places = [
            staging.take((size * per_token // shape.dtype.itemsize,), shape.dtype.storage)
            for _ in range(_BUFFERS)
        ]

        def fetch(first: int, place: tuple[cold_pool_pb2.Region, npt.NDArray[Any]]) -> npt.NDArray[Any]:
            count = min(size, tokens - first)
            region, flat = place
            used = cold_pool_pb2.Region(
                offset=region.offset, length=count * per_token, generation=region.generation
            )
            which = cold_pool_pb2.TokenRange(first_token=first, count=count)
            request = cold_pool_pb2.FetchRequest(
                context_id=self._context.context_id, layer=layer, rows=used, range=which
            )
            session = self._context.session
            session.counters.read_bytes += session.call("Fetch", request).read_bytes
            self.ios += -(-used.length // COMMAND_BYTES)
            numbers = count * per_token // shape.dtype.itemsize
            return flat[:numbers].reshape(shape.kv_heads, count, 2, shape.head_dim)

        coming = self._ahead.submit(fetch, start, places[0])
        for at, first in enumerate(range(start, tokens, size)):
            rows = coming.result()
            if first + size < tokens:
                coming = self._ahead.submit(fetch, first + size, places[(at + 1) % _BUFFERS])
            yield first, rows

    def close(self) -> None:
        """End the thread, and free the context if it is owned."""
        self._ahead.shutdown()
        if self._owned:
            self._context.close()
