"""Makes a pool behave in time like another device; bytes and arithmetic stay real."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from hillinfer_core.wait import wait_until

from .profiles import Profile


class Pacing:
    """The clock of a modelled device, shared by all that use it; thread-safe.

    Each method is called when a real operation is done, with the :meth:`now` of its start, and returns when
    the modelled device would be done too: at once if it already would. Reads, appends and P2P wait for one
    another on the one NAND; the latency of a command passes beside other transfers.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._lock = threading.Lock()
        self._nand_free = 0.0

    @staticmethod
    def now() -> float:
        """Return the time in seconds, of the clock that the methods use."""
        return time.perf_counter()

    def append(self, started: float, nbytes: int) -> None:
        """Wait for a write of ``nbytes`` from the host to NAND."""
        self._nand(started, _time(nbytes, self.profile.nand_write, self.profile.host_write))

    def read(self, started: float, nbytes: int, requests: int = 1) -> None:
        """Wait for reads of ``nbytes`` in all from NAND to the host, in as many ``requests``."""
        limit = self.profile
        nbytes = max(nbytes, requests * limit.smallest)
        busy = _time(nbytes, limit.nand_read, limit.host_read)
        self._nand(started, max(busy, requests / limit.read_iops if limit.read_iops else 0))

    def load(self, started: float, nbytes: int) -> None:
        """Wait for a copy of ``nbytes`` from the host to the card's memory."""
        wait_until(started + _time(nbytes, self.profile.host_write))

    def evaluate(self, started: float, parts: Sequence[tuple[int, bool]]) -> None:
        """Wait for a scan of ``parts`` in order: bytes of keys, and whether they come from NAND by P2P.

        Parts are brought one after another, each while those before it are scanned.
        """
        limit = self.profile
        scanned = started
        for nbytes, streamed in parts:
            if streamed:
                arrived = self._use_nand(started, _time(nbytes, limit.p2p, limit.nand_read)) + limit.latency
                scanned = max(scanned, arrived)
            scanned += _time(nbytes, limit.scan)
        wait_until(scanned)

    def _nand(self, started: float, busy: float) -> None:
        wait_until(self._use_nand(started, busy) + self.profile.latency)

    def _use_nand(self, started: float, busy: float) -> float:
        with self._lock:
            self._nand_free = max(self._nand_free, started) + busy
            return self._nand_free


def _time(nbytes: int, *rates: float) -> float:
    return max((nbytes / rate for rate in rates if rate), default=0.0)
