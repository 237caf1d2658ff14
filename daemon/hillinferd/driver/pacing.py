"""Makes a pool behave in time like another device; bytes and arithmetic stay real."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from .profiles import Profile

SPIN_S = 60e-6
"""Waited for without sleeping: Linux rounds a sleep up by as much as 50 us (timer slack, prctl(2))."""


class Pacing:
    """The clock of a modelled device, shared by all that use it; thread-safe.

    Each method is a context manager around the real operation: it returns when the model would have
    finished, or when the real operation has, whichever is later. Reads, appends and P2P wait for one
    another on the one NAND; the latency of a command passes beside other transfers.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._lock = threading.Lock()
        self._nand_free = 0.0

    @contextmanager
    def append(self, nbytes: int) -> Iterator[None]:
        """Pace a write of ``nbytes`` to NAND from the host."""
        limit = self.profile
        with self._nand(_time(nbytes, limit.nand_write, limit.host_write)):
            yield

    @contextmanager
    def read(self, nbytes: int) -> Iterator[None]:
        """Pace a read of ``nbytes`` that follow one another, from NAND to the host."""
        limit = self.profile
        nbytes = max(nbytes, limit.smallest)
        with self._nand(_time(nbytes, limit.nand_read, limit.host_read)):
            yield

    @contextmanager
    def gather(self, offsets: npt.NDArray[np.uint64], row_bytes: int) -> Iterator[None]:
        """Pace reads of ``row_bytes`` from each of ``offsets``; pages that touch are one command."""
        limit = self.profile
        if limit.name == "none":
            yield
            return
        commands, pages = _commands(offsets, row_bytes, limit.smallest, limit.command)
        busy = max(
            _time(pages * limit.smallest, limit.nand_read, limit.host_read),
            commands / limit.read_iops if limit.read_iops else 0,
        )
        with self._nand(busy):
            yield

    @contextmanager
    def load(self, nbytes: int) -> Iterator[None]:
        """Pace a copy of ``nbytes`` from the host to the card's memory."""
        started = time.perf_counter()
        yield
        _wait(started + _time(nbytes, self.profile.host_write))

    @contextmanager
    def evaluate(self, parts: Sequence[tuple[int, bool]]) -> Iterator[None]:
        """Pace a scan of ``parts`` in order: bytes of keys, and whether they come from NAND by P2P.

        A part is brought while the one before it is scanned.
        """
        limit = self.profile
        started = time.perf_counter()
        arrived = scanned = started
        for nbytes, streamed in parts:
            if streamed:
                arrived = self._use_nand(started, _time(nbytes, limit.p2p, limit.nand_read)) + limit.latency
                scanned = max(scanned, arrived)
            scanned += _time(nbytes, limit.scan)
        yield
        _wait(scanned)

    @contextmanager
    def _nand(self, busy: float) -> Iterator[None]:
        finish = self._use_nand(time.perf_counter(), busy) + self.profile.latency
        yield
        _wait(finish)

    def _use_nand(self, asked: float, busy: float) -> float:
        with self._lock:
            self._nand_free = max(self._nand_free, asked) + busy
            return self._nand_free


def _time(nbytes: int, *rates: float) -> float:
    return max((nbytes / rate for rate in rates if rate), default=0.0)


def _commands(offsets: npt.NDArray[np.uint64], row_bytes: int, page: int, most: int) -> tuple[int, int]:
    """Return how many commands of at most ``most`` bytes read the rows, and how many pages they read."""
    first = offsets.astype(np.int64) // page
    last = (offsets.astype(np.int64) + row_bytes - 1) // page
    span = np.arange((row_bytes - 1) // page + 2)
    pages = np.unique(np.minimum(first[:, None] + span, last[:, None]))
    breaks = np.flatnonzero(np.diff(pages) > 1)
    lengths = np.diff(np.concatenate(([-1], breaks, [pages.size - 1])))
    return int((-(-lengths // (most // page))).sum()), int(pages.size)


def _wait(until: float) -> None:
    left = until - time.perf_counter()
    if left > SPIN_S:
        time.sleep(left - SPIN_S)
    while time.perf_counter() < until:
        pass
