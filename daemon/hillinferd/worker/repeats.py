"""Evaluations that repeat, as each token asks for one in every layer: packet to answer in native code."""

from __future__ import annotations

import socket

import numpy as np

from hillinfer_core import kernel
from hillinfer_core._native import Repeats as Native
from hillinfer_core.arena import Arena
from hillinfer_core.layout import Reduction

from ..driver.contract import Driver
from . import messages
from .keys import KeyKeeper
from .store import LayerStore


class Repeats:
    """Answers what was kept, in native code; blocks, one thread only.

    What is kept holds for as long as no context, key or arena changes: whoever changes one calls
    :meth:`clear`. An evaluation that fails there is Python's to carry out, and to say what is wrong.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._key_bytes = 0
        few, many = kernel.thread_counts()
        self._native = Native(few, many, kernel.SEVERAL_THREADS_BYTES)

    def next(self, sock: socket.socket) -> tuple[bytes, int | None]:
        """Block for the next packet that is not answered already, and return it and its descriptor.

        The packet is empty at hang-up. Raises ``OSError``.
        """
        packet, fd = self._native.next(sock.fileno())
        return packet, None if fd < 0 else fd

    def clear(self) -> None:
        """Forget everything."""
        self._native.clear()

    def keep(self, ask: messages.Evaluate, arena: Arena, store: LayerStore, keys: KeyKeeper) -> None:
        """Answer ``ask`` from now on, if the host can: it was carried out, for one context."""
        how, source = store.quantisation, self._driver.row_source()
        if how is None or source is None or ask.reduction is Reduction.none or len(ask.evaluations) != 1:
            return
        if keys.residency.used_bytes != self._key_bytes:
            # Keys came or went: what is kept would say so wrongly, or hold on to some that went.
            self._key_bytes = keys.residency.used_bytes
            self.clear()
        (item,), shape, places = ask.evaluations, store.shape, store.places
        held = keys.held(store, 0, store.tokens) or keys.held(store, item.first_token, item.end_token)
        if held is None:
            return
        self._native.keep(
            ask.session_id, ask.packed, arena.content, item.query.offset, ask.query_heads // shape.kv_heads,
            ask.reduction is Reduction.sum,
            np.ascontiguousarray(how.ranges.scale), np.ascontiguousarray(how.ranges.zero), kernel.variant(),
            held.parts, held.bits, held.origin, item.k,
            item.ids.offset, item.scores.offset if item.scores.length else None,
            item.held.offset, item.held.length // (4 * shape.kv_heads),
            places.extents, places.row_bytes, places.tokens, places.checksums,
            item.rows.offset, item.rows.length // shape.row_bytes, how.generation, self._key_bytes,
            source.memory, source.fd, source.direct, source.depth, source.capacity,
        )  # fmt: skip
