"""The xrt driver: a pool on a SmartSSD's drive, evaluation in its FPGA."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import numpy as np
import numpy.typing as npt

from hillinfer_core.errors import ConfigError, DeviceUnavailable
from hillinfer_core.layout import PAGE
from hillinfer_core.reference import U8

from ...cec.cards import SMARTSSD
from ...cec.configurable import Outcome, Vector
from ..block import is_block_device
from ..contract import Bytes, Identity, KeySegment, Requests, RowSource, Scan, Winners
from ..settings import DriverSettings
from ..storage import Storage
from .card import Card
from .p2p import p2p_works
from .scan import Scanner
from .transfer import Reader


class XrtDriver:
    """Drives the pool and the card of ``settings``; see :class:`~hillinferd.driver.contract.Driver`.

    The bitstream of the settings is loaded unless the card has it; without one rows are stored, and a scan
    raises :class:`DeviceUnavailable` until :meth:`configure`. It is also a
    :class:`~hillinferd.cec.configurable.Configurable`.

    Raises what :class:`.storage.Storage`, :class:`.card.Card` and :meth:`configure` raise.
    """

    def __init__(self, settings: DriverSettings) -> None:
        self._card = Card(settings.card)
        self._storage = _open_storage(settings)
        self._reader = Reader(self._storage.fileno(), self._storage.direct_io)
        self._scanner: Scanner | None = None
        # The room for work is taken first (cards.py: our choice); more of it makes keys give way.
        left = SMARTSSD.dram_bytes - SMARTSSD.dram_reserve_bytes
        self._key_memory = min(settings.key_memory, left)
        try:
            if settings.bitstream:
                self.configure(Path(settings.bitstream))
        except BaseException:
            self.close()
            raise

    @property
    def requests(self) -> Requests:
        """Requests to the drive by the host."""
        return self._storage.requests

    def identify(self) -> Identity:
        """Return what is driven; ``key_memory`` is of the card."""
        storage = self._storage
        return Identity(
            driver="xrt",
            path=str(storage.path),
            direct_io=storage.direct_io,
            capacity=storage.capacity,
            pool_id=storage.pool_id,
            fresh=storage.fresh,
            key_memory=self._key_memory,
        )

    def health(self) -> None:
        """Read the pool's header, and ask the card; raises too after a run that hung."""
        self._storage.health()
        self._card.health()
        if self._scanner is not None:
            self._scanner.check()

    def write(self, offset: int, data: Bytes) -> None:
        """Write whole pages."""
        self._storage.write(offset, data)

    def flush(self) -> None:
        """Make what was written safe from a loss of power."""
        self._storage.flush()

    def read(self, offset: int, out: Bytes) -> int:
        """Read a range."""
        return self._storage.read(offset, out)

    def read_ranges(self, parts: Sequence[tuple[int, Bytes]]) -> int:
        """Read several ranges together."""
        return self._storage.read_ranges(parts)

    def gather(self, offsets: npt.NDArray[np.uint64], out: npt.NDArray[np.uint8]) -> int:
        """Read scattered rows."""
        return self._storage.gather(offsets, out)

    def discard(self, offset: int, length: int) -> None:
        """Give space back."""
        self._storage.discard(offset, length)

    def load_keys(self, segment: KeySegment, tiles: U8) -> None:
        """Copy the keys to the card's memory."""
        if self._scanner is None:
            raise MemoryError("the card has no bitstream, so that its memory cannot be used")
        self._scanner.residency.load(segment, tiles)

    def unload_keys(self, offset: int) -> None:
        """Give the keys' memory back."""
        if self._scanner is not None:
            self._scanner.residency.unload(offset)

    def held_keys(self, offset: int) -> U8 | None:
        """Return None: the keys are in the card's memory."""
        return None

    def row_source(self) -> RowSource | None:
        """Return None: without keys in the host's memory it is of no use."""
        return None

    def evaluate(self, scan: Scan) -> Winners:
        """Run the kernel on every segment that holds tokens of the scan, and merge what they find.

        Segments are read whole, so that their checksums can be compared, loaded ones too. Raises
        :class:`InvalidInput` for more than 8 query vectors and for segments of more than 131,072 tokens,
        which the kernel does not take, and :class:`DeviceUnavailable` if the bitstream lacks the precision.
        """
        return self._configured().evaluate(scan)

    def interface_uuids(self) -> list[UUID]:
        """Return the card's shells."""
        return self._card.interface_uuids()

    def loaded_uuid(self) -> UUID | None:
        """Return the uuid of the card's bitstream, or None."""
        return self._card.loaded_uuid()

    def configure(self, path: Path) -> None:
        """Load a bitstream, as :meth:`.card.Card.load` does; loaded keys are forgotten."""
        if self._scanner is not None:
            self._scanner.check()
        self.release()
        kernels = self._card.kernels(self._card.load(path))
        if not kernels:
            raise DeviceUnavailable(
                f"{path.name} has no evaluation kernel; load one that has with hillinferctl cec load"
            )
        group = self._card.group(next(iter(kernels.values())))
        first_page = bytearray(PAGE)
        self._storage.read(0, memoryview(first_page))
        p2p = p2p_works(self._card, group, self._reader, bytes(first_page))
        self._scanner = Scanner(
            self._card, kernels, group, self._reader, p2p=p2p, key_capacity=self._key_memory
        )

    def release(self) -> None:
        """Give the card's memory back; scans are refused until :meth:`configure`.

        After a run that hung nothing is given back, and scans stay refused.
        """
        if self._scanner is not None and not self._scanner.hung:
            self._scanner.close()
            self._scanner = None

    def run_vector(self, kernel: str, vector: Vector) -> Outcome:
        """Run the kernel on one vector of the self-test."""
        return self._configured().run_vector(kernel, vector)

    def close(self) -> None:
        """Give the card's memory back and close the pool."""
        self._reader.close()
        if self._scanner is not None:
            self._scanner.close()
        self._storage.close()

    def _configured(self) -> Scanner:
        if self._scanner is None:
            raise DeviceUnavailable(
                f"card {self._card.bdf} has no bitstream; load one with hillinferctl cec load"
            )
        return self._scanner


def _open_storage(settings: DriverSettings) -> Storage:
    path = Path(settings.path)
    if is_block_device(path) and not os.access(path, os.R_OK | os.W_OK):
        raise ConfigError(
            f"pool: {path} may not be opened by this user; give the drive to it with a udev rule, or "
            "usermod -aG disk USER and log in again (docs/smartssd.md)"
        )
    return Storage(path, settings.capacity, keep=settings.keep, new_id=settings.new_id)
