"""Holding a pool and its catalogue against each other: every row, every sealed key, every extent."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hillinfer_core import kernel
from hillinfer_core.errors import ConfigError, DamagedCatalogue
from hillinfer_core.layout import TILE_TOKENS, Shape

from ..domain.content import LayerContent
from ..domain.contexts import Catalogue, Quotas
from ..domain.durable import Durable
from ..domain.extents import GRANULE, ExtentAllocator
from ..domain.placement import Placed
from ..driver.storage import Storage, aligned
from .durable import DurableRecords


@dataclass
class ContextReport:
    """What was found of one durable context. ``problem`` is empty where the records hang together.

    Damaged keys are no loss: they are made anew from the rows when they are next used.
    """

    name: str
    uid: int
    saved: bool
    tokens: int
    rows: int = 0
    damaged_rows: int = 0
    damaged_keys: int = 0
    problem: str = ""

    @property
    def lost(self) -> bool:
        """Whether the context can no longer be used."""
        return bool(self.problem) or self.damaged_rows > 0


@dataclass
class PoolReport:
    """What was found of a pool; sizes in bytes."""

    capacity_bytes: int
    used_bytes: int = 0
    contexts: list[ContextReport] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing is lost."""
        return not any(context.lost for context in self.contexts)


def check(storage: Storage, records: DurableRecords) -> tuple[PoolReport, list[Durable]]:
    """Read and verify everything; return the report and the contexts that can no longer be used.

    Blocks for as long as the drive takes. Raises :class:`ConfigError` if the catalogue belongs to
    another pool, :class:`DamagedCatalogue` if it cannot be read, ``OSError`` from the drive.
    """
    if records.database.pool_id != storage.pool_id:
        raise ConfigError(
            f"the catalogue belongs to another pool than {storage.path}; name the directory of its own with "
            "--state-dir, or move this catalogue away"
        )
    allocator = ExtentAllocator(storage.capacity, reserved=GRANULE)
    books = Catalogue(allocator, Quotas(0, 0))
    report = PoolReport(storage.capacity)
    lost = []
    for durable in records.load():
        tokens = durable.layers[0].tokens + durable.tails[0]
        found = ContextReport(durable.name, durable.uid, durable.saved, tokens)
        report.contexts.append(found)
        try:
            books.restore(durable)
            for content in records.content(durable):
                _check_layer(storage, durable.shape, content, found)
        except DamagedCatalogue as error:
            found.problem = str(error)
        if found.lost:
            lost.append(durable)
    report.used_bytes = allocator.used_bytes
    return report, lost


def _check_layer(storage: Storage, shape: Shape, content: LayerContent, found: ContextReport) -> None:
    for placed in content.placed:
        end = min(placed.end_token, content.tokens)
        for head in range(shape.kv_heads):
            wanted = content.row_checksums[head, placed.first_token : end]
            if wanted.size:
                data = _read(
                    storage, placed.row_offset(head, placed.first_token, shape.row_bytes), wanted.size, shape
                )
                found.damaged_rows += int((kernel.row_checksums(data) != wanted).sum())
                found.rows += wanted.size
    places: dict[int, Placed] = {placed.first_token: placed for placed in content.placed}
    for sealed in content.sealed:
        tiles = aligned(shape.kv_heads * sealed.tokens // TILE_TOKENS * shape.key_tile_bytes)
        storage.read(places[sealed.first_token].keys_offset(shape), tiles.data)
        by_head = tiles.reshape(shape.kv_heads, -1, shape.key_tile_bytes)
        found.damaged_keys += tuple(kernel.data_checksums(by_head).tolist()) != sealed.checksums


def _read(storage: Storage, offset: int, rows: int, shape: Shape) -> npt.NDArray[np.uint8]:
    data = aligned(rows * shape.row_bytes)
    storage.read(offset, data.data)
    return data.reshape(rows, shape.row_bytes)
