"""The durable contexts of a drive, as the event loop uses their records: every call waits in a thread."""

from __future__ import annotations

import asyncio
import os
import pickle
import uuid
from pathlib import Path

from hillinfer_core.errors import ConfigError, DamagedCatalogue

from ..domain.content import Appended
from ..domain.durable import Durable
from ..domain.placement import Placed
from ..domain.quantisation import SealedKeys
from ..driver.contract import Identity
from ..records import files_of, is_there
from ..records.database import Database
from ..records.durable import DurableRecords


class DurableStore:
    """Records in the catalogue file ``path``, for a pool at ``pool``. One call at a time.

    Raises :class:`DamagedCatalogue`, ``PoolFull`` or ``DeviceUnavailable``; a change that raises was not
    made.
    """

    def __init__(self, path: Path, pool: Path) -> None:
        self._path = path
        self._pool = pool
        self._records: DurableRecords | None = None

    async def open(self) -> None:
        """Open the file, or make it where there is no pool yet; raises :class:`ConfigError` if it cannot be.

        Call before the pool is opened: a pool without a catalogue is then known to have lost it. The
        catalogue of a device is made at its first use.
        """
        if is_there(self._path) or not os.path.isfile(self._pool) or self._pool.stat().st_size == 0:
            self._records = await asyncio.to_thread(_open, self._path)

    @property
    def new_pool_id(self) -> str:
        """The UUID that a pool is to have if it is made now.

        Empty where there are contexts already: a new pool must not be taken for the one that holds them.
        """
        if self._records is None or next(self._records.database.all("context"), None):
            return ""
        return self._records.database.pool_id

    async def recover(self, identity: Identity) -> list[Durable]:
        """Return every durable context of the pool that ``identity`` describes."""
        if self._records is None:
            raise DamagedCatalogue(
                f"the pool {identity.path} has no catalogue at {self._path}; restore it, or delete the pool "
                "to begin with an empty one"
            )
        try:
            return await asyncio.to_thread(_recover, self._records, identity)
        except DamagedCatalogue:
            if self._records.database.fresh:
                # Made just now, for a pool that is not its own: the next start must not take it for one.
                await self.close()
                self._records = None
                for path in files_of(self._path):
                    path.unlink(missing_ok=True)
            raise

    async def create(self, durable: Durable) -> None:
        """Record a new, empty context."""
        await asyncio.to_thread(self._opened.create, durable)

    async def append(
        self, durable: Durable, layer: int, tokens: int, placed: list[Placed], done: Appended
    ) -> None:
        """Record an append that the worker has carried out."""
        await asyncio.to_thread(self._opened.append, durable, layer, tokens, placed, done)

    async def put_tail(self, durable: Durable, layer: int, tokens: int, rows: bytes) -> None:
        """Keep rows aside."""
        await asyncio.to_thread(self._opened.put_tail, durable, layer, tokens, rows)

    async def tail(self, durable: Durable, layer: int, nbytes: int) -> bytes:
        """Return the ``nbytes`` kept aside for a layer."""
        data = await asyncio.to_thread(self._opened.tail, durable, layer)
        if len(data) != nbytes:
            raise DamagedCatalogue(
                f"the tail of layer {layer} of {durable.name!r} has {len(data)} bytes, not {nbytes}; "
                "delete the context"
            )
        return data

    async def save(self, durable: Durable, sealed: list[tuple[int, SealedKeys]]) -> None:
        """Record that the context is complete, and note its checksum, which stays the same from then on."""
        # Of rows and tails, which are there: nothing can fail once the record is made.
        contents = await asyncio.to_thread(self._opened.content, durable)
        checksum = await asyncio.to_thread(self._opened.checksum, durable, contents)
        await asyncio.to_thread(self._opened.save, durable, sealed)
        durable.checksum = checksum

    async def delete(self, durable: Durable) -> None:
        """Forget the context."""
        await asyncio.to_thread(self._opened.delete, durable)

    async def content(self, durable: Durable) -> int:
        """Return a descriptor, to be closed, of a file with what a worker needs to load the context.

        Notes its checksum.
        """
        contents = await asyncio.to_thread(self._opened.content, durable)
        durable.checksum = await asyncio.to_thread(self._opened.checksum, durable, contents)
        fd = os.memfd_create("hillinfer-context", os.MFD_CLOEXEC)
        with open(os.dup(fd), "wb") as file:
            pickle.dump(contents, file, pickle.HIGHEST_PROTOCOL)
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    async def close(self) -> None:
        """Settle and close the file; harmless if it is not open."""
        if self._records is not None:
            records, self._records = self._records, None
            await asyncio.to_thread(records.database.close)

    @property
    def _opened(self) -> DurableRecords:
        assert self._records is not None
        return self._records


def _open(path: Path) -> DurableRecords:
    if not os.path.isdir(path.parent):
        raise ConfigError(f"No such file or directory: {path.parent}, for pool and catalogue; make it")
    database = Database(path)
    if not database.pool_id:
        # Before there is a pool: made with this number, it is known for ours whenever the power goes.
        database.bind(str(uuid.uuid4()))
    return DurableRecords(database)


def _recover(records: DurableRecords, identity: Identity) -> list[Durable]:
    database = records.database
    if database.pool_id != identity.pool_id:
        if database.pool_id and next(database.all("context"), None):
            raise DamagedCatalogue(
                f"the catalogue belongs to another pool than {identity.path}; bring back the pool that was "
                "there, or delete the catalogue to give up its contexts"
            )
        if not identity.fresh:
            raise DamagedCatalogue(
                f"the pool {identity.path} was used with another catalogue; name its state_dir, or give up "
                "what is in the pool: delete it (a device: `hillinferctl format --force`)"
            )
        database.bind(identity.pool_id)
    return records.load()
