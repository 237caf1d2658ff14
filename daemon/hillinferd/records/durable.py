"""Durable contexts as records: written with every append, read at start and when one is loaded."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from hillinfer_core.errors import DamagedCatalogue, HillInferError, VersionMismatch
from hillinfer_core.layout import DType, Precision, Shape
from hillinfer_core.protocol import LAYOUT_VERSION
from hillinfer_core.reference import Ranges

from ..domain.content import Appended, LayerContent
from ..domain.durable import Durable
from ..domain.extents import Extent
from ..domain.layers import Layer
from ..domain.placement import Placed
from ..domain.quantisation import Quantisation, SealedKeys
from ..logs import get_logger
from .database import Database, Key

log = get_logger(__name__)


class DurableRecords:
    """The durable contexts in a :class:`Database`. Every method blocks."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def load(self) -> list[Durable]:
        """Return every durable context; raises :class:`DamagedCatalogue` if one does not hang together."""
        found = [self._decode(key, body) for key, body in self.database.all("context")]
        known = {durable.record_id for durable in found}
        for kind in ("layer", "ranges", "extent", "rows", "tail"):
            for key, _ in self.database.all(kind):
                if key.context not in known:
                    raise _damaged(f"a record of kind {kind!r} belongs to no context")
        return found

    def create(self, durable: Durable) -> None:
        """Write a new, empty durable context, and give it its number."""
        durable.record_id = max((key.context for key, _ in self.database.all("context")), default=0) + 1
        try:
            with self.database.transaction():
                self._put_context(durable)
                for index in range(durable.shape.layers):
                    self._put_layer(durable, index, 0, None)
        except BaseException:
            durable.record_id = 0
            raise

    def append(self, durable: Durable, layer: int, tokens: int, placed: list[Placed], done: Appended) -> None:
        """Write an append of ``tokens`` to ``layer``, which took the new extents ``placed``."""
        held = durable.layers[layer].tokens
        with self.database.transaction():
            self._put_layer(durable, layer, held + tokens, done.quantisation)
            sealed = {item.first_token: item for item in done.sealed}
            for item in placed:
                self._put_extent(durable, layer, item, sealed.pop(item.first_token, None))
            for item in durable.layers[layer].placed:
                if item.first_token in sealed:
                    self._put_extent(durable, layer, item, sealed[item.first_token])
            # What was kept aside is among the new tokens, or never will be.
            self.database.drop(Key("tail", durable.record_id, layer))
            checksums = np.ascontiguousarray(done.row_checksums).tobytes()
            self.database.put(Key("rows", durable.record_id, layer, held), checksums)

    def put_tail(self, durable: Durable, layer: int, tokens: int, rows: bytes) -> None:
        """Write the rows kept aside for ``layer`` in place of any that were."""
        with self.database.transaction():
            body = tokens.to_bytes(4, "little") + rows
            self.database.put(Key("tail", durable.record_id, layer), body)

    def tail(self, durable: Durable, layer: int) -> bytes:
        """Return the rows kept aside for ``layer``; raises :class:`DamagedCatalogue`."""
        return (self.database.get(Key("tail", durable.record_id, layer)) or bytes(4))[4:]

    def save(self, durable: Durable, sealed: Iterable[tuple[int, SealedKeys]]) -> None:
        """Write that the context is complete, with the evaluation keys sealed for that, by layer."""
        with self.database.transaction():
            self._put_context(durable, saved=True)
            for layer, item in sealed:
                placed = next(p for p in durable.layers[layer].placed if p.first_token == item.first_token)
                self._put_extent(durable, layer, placed, item)
        try:
            self.database.settle()
        except HillInferError as error:
            # The commit is made; the log is moved into the file later.
            log.warning("the catalogue's log was not moved into it", error=error)

    def delete(self, durable: Durable) -> None:
        """Delete all records of the context."""
        with self.database.transaction():
            self.database.delete(durable.record_id)

    def content(self, durable: Durable) -> list[LayerContent]:
        """Return what a worker needs to go on with each layer."""
        return [self._content(durable, index) for index in range(durable.shape.layers)]

    def checksum(self, durable: Durable, contents: Iterable[LayerContent]) -> int:
        """Return the CRC-32 over the row checksums of ``contents``, which are all there is, and its tails."""
        value = 0
        for index, content in enumerate(contents):
            value = zlib.crc32(content.row_checksums.tobytes(), value)
            value = zlib.crc32(self.tail(durable, index), value)
        return value

    def _content(self, durable: Durable, index: int) -> LayerContent:
        shape = durable.shape
        fields = self._json(Key("layer", durable.record_id, index))
        sealed = [
            SealedKeys(key.first, extent["sealed"], tuple(extent["checksums"]))
            for key, extent in self._extents(durable.record_id, index)
            if extent["sealed"]
        ]
        tokens = fields["tokens"]
        checksums = np.empty((shape.kv_heads, tokens), np.uint32)
        held = 0
        for key, body in self.database.all("rows", durable.record_id, index):
            new = np.frombuffer(body, np.uint32).reshape(shape.kv_heads, -1)
            if key.first != held or held + new.shape[1] > tokens:
                raise _damaged(f"checksums of layer {index} of {durable.name!r} are missing")
            checksums[:, held : held + new.shape[1]] = new
            held += new.shape[1]
        if held != tokens:
            raise _damaged(f"checksums of layer {index} of {durable.name!r} are missing")
        quantisation = None
        if tokens:
            raw = self.database.get(Key("ranges", durable.record_id, index)) or b""
            both = np.frombuffer(raw, np.float32)
            if both.size != 2 * shape.kv_heads * shape.head_dim:
                raise _damaged(f"ranges of layer {index} of {durable.name!r} are missing")
            zero, scale = both.reshape(2, shape.kv_heads, shape.head_dim)
            counts = (fields[name] for name in ("fitted", "later", "clipped", "generation"))
            quantisation = Quantisation(Ranges(zero=zero, scale=scale), *counts)
        return LayerContent(tokens, durable.layers[index].placed, quantisation, sealed, checksums)

    def _decode(self, key: Key, body: bytes) -> Durable:
        fields = json.loads(body)
        if fields["layout"] != LAYOUT_VERSION:
            raise VersionMismatch(
                f"context {fields['name']!r} has layout {fields['layout']}, this daemon {LAYOUT_VERSION}; "
                "use the hillinfer that wrote it, or delete the pool and its catalogue and fill new contexts"
            )
        shape = Shape(
            fields["layers"],
            fields["kv_heads"],
            fields["head_dim"],
            DType(fields["dtype"]),
            Precision(fields["precision"]),
        )
        durable = Durable(
            key.context,
            fields["name"],
            fields["uid"],
            shape,
            fields["labels"],
            fields["created"],
            fields["saved"],
            # Catalogues of before have none.
            unique=fields.get("unique") or f"{key.context}-{fields['created']}",
            gid=fields.get("gid"),
        )
        tails = {
            k.layer: int.from_bytes(tail[:4], "little") for k, tail in self.database.all("tail", key.context)
        }
        for index in range(shape.layers):
            tokens = self._json(Key("layer", key.context, index))["tokens"]
            layer = Layer(tokens)
            for at, extent in self._extents(key.context, index):
                if at.first != layer.covered:
                    raise _damaged(f"an extent of layer {index} of {durable.name!r} is missing")
                place = Extent(extent["offset"], extent["length"])
                layer.placed.append(Placed(at.first, extent["tokens"], place, extent["tokens"]))
            if layer.covered < tokens:
                raise _damaged(f"an extent of layer {index} of {durable.name!r} is missing")
            durable.layers.append(layer)
            durable.tails.append(tails.get(index, 0))
        return durable

    def _extents(self, context: int, layer: int) -> list[tuple[Key, dict[str, Any]]]:
        return [(key, json.loads(body)) for key, body in self.database.all("extent", context, layer)]

    def _json(self, key: Key) -> dict[str, Any]:
        body = self.database.get(key)
        if body is None:
            raise _damaged(f"the record of layer {key.layer} of context {key.context} is missing")
        fields: dict[str, Any] = json.loads(body)
        return fields

    def _put_context(self, durable: Durable, *, saved: bool = False) -> None:
        shape = durable.shape
        fields = {
            "layout": LAYOUT_VERSION,
            "name": durable.name,
            "uid": durable.uid,
            "unique": durable.unique,
            "gid": durable.gid,
            "labels": durable.labels,
            "created": durable.created_unix_s,
            "saved": saved,
            "layers": shape.layers,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "dtype": shape.dtype.value,
            "precision": shape.precision.value,
        }
        self.database.put(Key("context", durable.record_id), json.dumps(fields).encode())

    def _put_layer(self, durable: Durable, layer: int, tokens: int, made: Quantisation | None) -> None:
        counts = (
            (made.fitted_tokens, made.later_tokens, made.clipped, made.generation) if made else (0, 0, 0, 0)
        )
        names = ("tokens", "fitted", "later", "clipped", "generation")
        fields = dict(zip(names, (tokens, *(int(count) for count in counts)), strict=True))
        self.database.put(Key("layer", durable.record_id, layer), json.dumps(fields).encode())
        if made:
            both = np.stack((made.ranges.zero, made.ranges.scale)).astype(np.float32)
            self.database.put(Key("ranges", durable.record_id, layer), both.tobytes())

    def _put_extent(self, durable: Durable, layer: int, placed: Placed, sealed: SealedKeys | None) -> None:
        fields = {
            "tokens": placed.stride,
            "offset": placed.extent.offset,
            "length": placed.extent.length,
            "sealed": sealed.tokens if sealed else 0,
            "checksums": list(sealed.checksums) if sealed else [],
        }
        key = Key("extent", durable.record_id, layer, placed.first_token)
        self.database.put(key, json.dumps(fields).encode())


def _damaged(what: str) -> DamagedCatalogue:
    return DamagedCatalogue(
        f"the catalogue is damaged: {what}; restore it together with its pool from a copy, or see what "
        "can be kept with `hillinferctl fsck`"
    )
