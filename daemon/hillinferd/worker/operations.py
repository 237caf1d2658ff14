"""Carries out requests on a driver: the worker's state is here, its socket is not."""

from __future__ import annotations

import errno
import os
import pickle
from dataclasses import dataclass, field

import numpy as np

from hillinfer_core import kernel
from hillinfer_core.arena import Arena
from hillinfer_core.errors import (
    DeviceUnavailable,
    HillInferError,
    InvalidInput,
    PoolFull,
    UnknownContext,
    name_of,
)
from hillinfer_core.layout import Shape
from hillinfer_core.packed import pack_results
from hillinfer_core.reference import U8

from ..cec.loader import Status
from ..domain.content import Appended, LayerContent
from ..domain.quantisation import SealedKeys
from ..domain.regions import Region
from ..driver.contract import Driver
from ..logs import get_logger
from . import messages, rows
from .append import append
from .configuration import Configuration
from .evaluate import evaluate
from .keys import KeyKeeper
from .messages import Done, Traffic
from .repeats import Repeats
from .store import LayerStore, lazy

log = get_logger(__name__)

_CHANGE_NOTHING = (messages.Evaluate, messages.FetchIds, messages.FetchRange, messages.Health)


@dataclass
class _Context:
    shape: Shape
    layers: dict[int, LayerStore] = field(default_factory=dict)


class Operations:
    """All arenas and contexts of a worker. Blocks while it works; one thread only.

    What it has ranked is kept in ``repeats``, to be answered there when it is asked again.
    """

    def __init__(
        self, driver: Driver, configuration: Configuration | None = None, repeats: Repeats | None = None
    ) -> None:
        self._driver = driver
        self._configuration = configuration
        self._repeats = repeats
        self._keys = KeyKeeper(driver)
        self._arenas: dict[int, Arena] = {}
        self._contexts: dict[int, _Context] = {}
        self._copy: U8 = lazy((0,), np.uint8)

    def carry_out(self, request: messages.Request, fd: int | None) -> messages.Reply:
        """Carry out ``request`` with the descriptor that came along, and return the reply; raises nothing."""
        if self._repeats is not None and not isinstance(request, _CHANGE_NOTHING):
            self._repeats.clear()
        traffic = Traffic()
        requests = self._driver.requests
        reads, writes = requests.reads, requests.writes
        try:
            return self._carry_out(request, fd, traffic)
        except HillInferError as error:
            return messages.Failed(name_of(error), str(error), traffic)
        except OSError as error:
            log.error("the drive failed", request=type(request).__name__, error=error)
            return _drive_failed(error, traffic)
        except Exception as error:
            log.exception("unexpected error", request=type(request).__name__)
            return messages.Failed(
                HillInferError.__name__, f"internal error in the worker: {error!r}", traffic
            )
        finally:
            traffic.reads = requests.reads - reads
            traffic.writes = requests.writes - writes

    def _carry_out(self, request: messages.Request, fd: int | None, traffic: Traffic) -> messages.Reply:
        match request:
            case messages.Evaluate():
                return self._evaluate(request, traffic)
            case messages.Append():
                store = self._layer(request.context_id, request.layer)
                rows = self._copied(self._arenas[request.session_id], request.rows)
                done = append(self._driver, self._keys, store, request, rows, traffic)
                return self._done(traffic, request.context_id, appended=done if request.durable else None)
            case messages.FetchIds():
                self._fetch_ids(request, traffic)
            case messages.FetchRange():
                self._fetch_range(request, traffic)
            case messages.FetchKeys():
                return self._done(traffic, keys=self._fetch_keys(request, traffic))
            case messages.OpenContext():
                self._contexts[request.context_id] = self._opened(request)
                return self._done(traffic, request.context_id)
            case messages.LoadContext():
                self._load(request, fd, traffic)
                return self._done(traffic, request.context_id)
            case messages.SealContext():
                return self._done(traffic, request.context_id, sealed=self._seal(request, traffic))
            case messages.DropContext():
                self._drop(request.context_id)
            case messages.Discard():
                for extent in request.extents:
                    self._driver.discard(extent.offset, extent.length)
            case messages.AttachArena():
                if fd is None:
                    raise InvalidInput("no descriptor came with the arena")
                self._arenas[request.session_id] = Arena(fd, request.nbytes, verify=True)
            case messages.DetachArena():
                self._arenas.pop(request.session_id, None)
            case messages.Health():
                self._driver.health()
            case messages.CecStatus() | messages.CecLoad() | messages.CecRollback():
                return self._done(traffic, bitstreams=self._configure(request))
        return self._done(traffic)

    def _done(
        self,
        traffic: Traffic,
        context_id: int | None = None,
        *,
        appended: Appended | None = None,
        sealed: list[tuple[int, SealedKeys]] | None = None,
        bitstreams: Status | None = None,
        keys: messages.BroughtKeys | None = None,
    ) -> Done:
        held = 0
        if context_id is not None:
            layers = self._contexts[context_id].layers.values()
            held = self._keys.claimed_bytes(layers) + sum(store.clipped.nbytes for store in layers)
        used = self._keys.residency.used_bytes
        return Done(
            traffic,
            appended=appended,
            sealed=sealed or [],
            key_bytes=used,
            context_key_bytes=held,
            bitstreams=bitstreams,
            keys=keys,
        )

    def _configure(self, request: messages.CecRequest) -> Status:
        if self._configuration is None:
            raise InvalidInput("this drive has no FPGA to configure")
        return self._configuration.carry_out(request)

    def _opened(self, request: messages.OpenContext) -> _Context:
        context = _Context(request.shape)
        if request.base:
            base = self._context(request.base)
            context.layers = {index: store.continued() for index, store in base.layers.items()}
        return context

    def _load(self, request: messages.LoadContext, fd: int | None, traffic: Traffic) -> None:
        if fd is None:
            raise InvalidInput("no descriptor came with the context")
        with open(os.dup(fd), "rb") as file:
            contents: list[LayerContent] = pickle.load(file)
        context = _Context(request.shape)
        self._contexts[request.context_id] = context
        try:
            for index, content in enumerate(contents):
                store = LayerStore.restored(request.shape, content)
                self._keys.rebuild_unsealed(store, traffic)
                context.layers[index] = store
        except BaseException:
            self._drop(request.context_id)
            raise

    def _seal(self, request: messages.SealContext, traffic: Traffic) -> list[tuple[int, SealedKeys]]:
        written = [
            (index, store, *self._keys.write_unsealed(store, segment, store.tokens, traffic))
            for index, store in self._context(request.context_id).layers.items()
            for segment in store.segments
            if segment.sealed is None and segment.placed.first_token < store.tokens
        ]
        self._driver.flush()
        for _, store, segment, sealed, tiles in written:
            self._keys.seal(store, segment, sealed, tiles)
        return [(index, sealed) for index, _, _, sealed, _ in written]

    def _drop(self, context_id: int) -> None:
        context = self._contexts.pop(context_id, None)
        if context is not None:
            for store in context.layers.values():
                self._keys.drop(store)

    def _evaluate(self, request: messages.Evaluate, traffic: Traffic) -> Done:
        arena = self._arenas[request.session_id]
        results, winners, missing = [], 0, 0
        for item in request.evaluations:
            store = self._layer(item.context_id, request.layer)
            result = evaluate(self._driver, self._keys, arena, store, request, item, traffic)
            results.append(result)
            winners += item.k * len(result.missing_per_head)
            missing += sum(result.missing_per_head)
        if self._repeats is not None and len(results) == 1:
            self._repeats.keep(request, arena, store, self._keys)
        used = self._keys.residency.used_bytes
        return Done(traffic, pack_results(results), winners, missing, key_bytes=used)

    def _fetch_ids(self, request: messages.FetchIds, traffic: Traffic) -> None:
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

    def _fetch_range(self, request: messages.FetchRange, traffic: Traffic) -> None:
        store = self._layer(request.context_id, request.layer)
        arena = self._arenas[request.session_id]
        shape = (store.shape.kv_heads, request.room, 2, store.shape.head_dim)
        room = arena.view(request.rows.offset, shape, store.shape.dtype.storage)
        out = room[:, request.skipped : request.skipped + request.count]
        _, read = rows.read_range(self._driver, store, request.first_token, request.count, out)
        traffic.read += read

    def _fetch_keys(self, request: messages.FetchKeys, traffic: Traffic) -> messages.BroughtKeys:
        store = self._layer(request.context_id, request.layer)
        arena, shape = self._arenas[request.session_id], store.shape
        if store.quantisation is None or request.end_token > store.tokens:
            raise InvalidInput(f"the worker's layer holds {store.tokens} tokens, not {request.end_token}")
        tiles = self._keys.tiles(store, request.first_token, request.end_token, traffic)
        arena.view(request.tiles.offset, tiles.shape, np.uint8)[:] = tiles
        scales = arena.view(request.scales.offset, (shape.kv_heads, shape.head_dim), np.float32)
        scales[:] = store.quantisation.ranges.scale
        # Of our copy, not of the arena's: what reaches the client otherwise shows there.
        checksums = kernel.data_checksums(tiles).tolist()
        return messages.BroughtKeys(store.quantisation.generation, checksums)

    def _copied(self, arena: Arena, region: Region) -> U8:
        """Return a copy of a region, good until the next: the client can change its arena at any time.

        What was checked must be what is written. Fresh memory for each would cost as much as the append.
        """
        if region.length > self._copy.size:
            self._copy = lazy((region.length,), np.uint8)
        copy = self._copy[: region.length]
        copy[:] = arena.view(region.offset, copy.shape, np.uint8)
        return copy

    def _context(self, context_id: int) -> _Context:
        if context_id not in self._contexts:
            raise UnknownContext(f"the worker has no context {context_id}")
        return self._contexts[context_id]

    def _layer(self, context_id: int, layer: int) -> LayerStore:
        context = self._context(context_id)
        if layer not in context.layers:
            context.layers[layer] = LayerStore(context.shape)
        return context.layers[layer]


def _drive_failed(error: OSError, traffic: Traffic) -> messages.Failed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = "the disk under the cold pool is full; free space there or name another with pool"
        return messages.Failed(PoolFull.__name__, message, traffic)
    reason = os.strerror(error.errno) if error.errno else str(error)
    return messages.Failed(
        DeviceUnavailable.__name__, f"the drive failed: {reason}; check it, then reopen", traffic
    )
