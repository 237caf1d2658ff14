"""The first page of a pool: what says that it is one, which one, and how large."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass

import numpy as np

from hillinfer_core import kernel
from hillinfer_core.errors import ConfigError, DamagedCatalogue, VersionMismatch
from hillinfer_core.layout import PAGE

HEADER_BYTES = PAGE
"""Bytes at the start of a pool that hold the header and never anything else."""

MAGIC = b"hillinfer cold pool "

VERSION = 2
"""Format of the header and of what it implies for the bytes after it."""

_SECTOR = 512  # a drive writes a sector wholly or not at all, so the header has no more than one
_FIELDS = struct.Struct("<20sI16sQ")
_CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class Header:
    """``pool_id`` names the pool for ever; ``capacity`` are its bytes, this page included."""

    pool_id: str
    capacity: int

    @classmethod
    def new(cls, capacity: int) -> Header:
        """Return the header of a new pool."""
        return cls(str(uuid.uuid4()), capacity)

    def pack(self) -> bytes:
        """Return the page: little-endian fields, then at byte 508 the CRC-32C of what is before it."""
        fields = _FIELDS.pack(MAGIC, VERSION, uuid.UUID(self.pool_id).bytes, self.capacity)
        sector = fields.ljust(_SECTOR - _CHECKSUM.size, b"\0")
        return (sector + _CHECKSUM.pack(_crc(sector))).ljust(PAGE, b"\0")

    @classmethod
    def unpack(cls, page: bytes, path: str) -> Header:
        """Return the header that ``page`` holds; ``path`` is for the message.

        Raises :class:`ConfigError` if this is no pool, :class:`DamagedCatalogue` for one whose header is
        damaged, and :class:`VersionMismatch` for one of another version.
        """
        if not page.startswith(MAGIC):
            raise ConfigError(f"pool: {path} has content that is not a cold pool; name a new file")
        sector = page[: _SECTOR - _CHECKSUM.size]
        found = page[len(sector) : _SECTOR]
        if len(found) != _CHECKSUM.size or found != _CHECKSUM.pack(_crc(sector)):
            raise DamagedCatalogue(
                f"the header of the cold pool {path} is damaged; restore the pool and its catalogue from a "
                "backup, or delete the file (a device: `hillinferctl format --force`) and lose its contexts"
            )
        _, version, pool_id, capacity = _FIELDS.unpack_from(sector)
        if version != VERSION:
            raise VersionMismatch(
                f"the cold pool {path} has format {version}, this hillinferd has format {VERSION}; "
                "use the hillinferd that made it, or name a new pool"
            )
        return cls(str(uuid.UUID(bytes=pool_id)), capacity)


def _crc(data: bytes) -> int:
    return int(kernel.row_checksums(np.frombuffer(data, np.uint8)[None, :])[0])
