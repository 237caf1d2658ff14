"""Carries out requests on a driver: the worker's state is here, its socket is not."""

from __future__ import annotations

import errno
import os

import numpy as np

from hillinfer_core.arena import Arena
from hillinfer_core.errors import DeviceUnavailable, HillInferError, InvalidInput, PoolFull, UnknownContext
from hillinfer_core.layout import Shape

from ..driver.contract import Driver
from ..logs import get_logger
from . import messages, rows
from .append import append
from .evaluate import Scratch, evaluate
from .store import LayerStore

log = get_logger(__name__)


class Operations:
    """All arenas and contexts of a worker. Blocks while it works; one thread only."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._arenas: dict[int, Arena] = {}
        self._contexts: dict[int, tuple[Shape, dict[int, LayerStore]]] = {}
        self._scratch = Scratch()

    def carry_out(self, request: messages.Request, fd: int | None) -> messages.Reply:
        """Carry out ``request`` with the descriptor that came along, and return the reply; raises nothing."""
        traffic = messages.Traffic()
        try:
            return messages.Done(traffic, self._carry_out(request, fd, traffic))
        except HillInferError as error:
            return messages.Failed(type(error).__name__, str(error), traffic)
        except OSError as error:
            log.error("the drive failed", request=type(request).__name__, error=error)
            return _drive_failed(error, traffic)
        except Exception as error:
            log.exception("unexpected error", request=type(request).__name__)
            return messages.Failed(
                HillInferError.__name__, f"internal error in the worker: {error!r}", traffic
            )

    def _carry_out(
        self, request: messages.Request, fd: int | None, traffic: messages.Traffic
    ) -> list[messages.Evaluated]:
        match request:
            case messages.Evaluate():
                return self._evaluate(request, traffic)
            case messages.Append():
                store = self._layer(request.context_id, request.layer)
                append(self._driver, self._arenas[request.session_id], store, request, traffic)
            case messages.FetchIds():
                self._fetch_ids(request, traffic)
            case messages.FetchRange():
                self._fetch_range(request, traffic)
            case messages.OpenContext():
                self._contexts[request.context_id] = (request.shape, {})
            case messages.DropContext():
                self._contexts.pop(request.context_id, None)
            case messages.Discard():
                for extent in request.extents:
                    self._driver.discard(extent.offset, extent.length)
            case messages.AttachArena():
                if fd is None:
                    raise InvalidInput("no descriptor came with the arena")
                self._arenas[request.session_id] = Arena(fd, request.nbytes, verify=True)
            case messages.DetachArena():
                self._arenas.pop(request.session_id, None)
        return []

    def _evaluate(self, request: messages.Evaluate, traffic: messages.Traffic) -> list[messages.Evaluated]:
        arena = self._arenas[request.session_id]
        results = []
        for item in request.evaluations:
            store = self._layer(item.context_id, request.layer)
            results.append(evaluate(self._driver, arena, store, request, item, self._scratch, traffic))
        return results

    def _fetch_ids(self, request: messages.FetchIds, traffic: messages.Traffic) -> None:
        store = self._layer(request.context_id, request.layer)
        arena = self._arenas[request.session_id]
        count = sum(request.count_per_head)
        # A copy: the client can change its arena between the check and the use.
        ids = arena.view(request.ids.offset, (count,), np.uint32).astype(np.int64)
        if ids.max() >= store.tokens:
            raise InvalidInput(
                f"token {ids.max()} does not exist; layer {request.layer} holds {store.tokens}"
            )
        heads = np.repeat(np.arange(store.shape.kv_heads), request.count_per_head)
        out = arena.view(request.rows.offset, (count, store.shape.row_bytes), np.uint8)
        traffic.read += rows.gather(self._driver, store, heads, ids, out)

    def _fetch_range(self, request: messages.FetchRange, traffic: messages.Traffic) -> None:
        store = self._layer(request.context_id, request.layer)
        arena = self._arenas[request.session_id]
        shape = (store.shape.kv_heads, request.count, 2, store.shape.head_dim)
        out = arena.view(request.rows.offset, shape, store.shape.dtype.storage)
        _, read = rows.read_range(self._driver, store, request.first_token, request.count, out)
        traffic.read += read

    def _layer(self, context_id: int, layer: int) -> LayerStore:
        if context_id not in self._contexts:
            raise UnknownContext(f"the worker has no context {context_id}")
        shape, layers = self._contexts[context_id]
        if layer not in layers:
            layers[layer] = LayerStore(shape)
        return layers[layer]


def _drive_failed(error: OSError, traffic: messages.Traffic) -> messages.Failed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = "the disk under the cold pool is full; free space there or name another with pool"
        return messages.Failed(PoolFull.__name__, message, traffic)
    reason = os.strerror(error.errno) if error.errno else str(error)
    return messages.Failed(
        DeviceUnavailable.__name__, f"the drive failed: {reason}; check it, then reopen", traffic
    )
