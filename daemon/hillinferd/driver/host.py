"""The host driver: a pool on a file or drive, and evaluation on the host's cores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hillinfer_core import kernel
from hillinfer_core.layout import PAGE, TILE_TOKENS
from hillinfer_core.reference import HISTOGRAM_BINS, U8, Ranked

from .contract import Bytes, DamagedKeys, Identity, KeySegment, Requests, RowSource, Scan, Winners
from .pacing import Pacing
from .profiles import NONE, profile
from .segments import overlapping
from .settings import DriverSettings
from .storage import Storage, aligned


class HostDriver:
    """Drives the pool of ``settings``; see :class:`~hillinferd.driver.contract.Driver`.

    Loaded evaluation keys are in DRAM. Others are read from the pool for every scan, one segment ahead of the
    scores, into two buffers as large as the largest segment yet.
    """

    def __init__(self, settings: DriverSettings, *, direct: bool = True) -> None:
        self._key_memory = settings.key_memory
        self._pacing = Pacing(profile(settings.profile))
        self._storage = Storage(
            Path(settings.path),
            settings.capacity,
            keep=settings.keep,
            direct=direct,
            pacing=self._pacing,
            new_id=settings.new_id,
        )
        self._keys: dict[int, U8] = {}
        self._ahead = ThreadPoolExecutor(1, "hillinferd-read-ahead")
        self._buffers = [aligned(0), aligned(0)]

    @property
    def requests(self) -> Requests:
        """Requests to the drive by the host."""
        return self._storage.requests

    def identify(self) -> Identity:
        """Return what is driven."""
        storage = self._storage
        return Identity(
            driver="host",
            path=str(storage.path),
            direct_io=storage.direct_io,
            capacity=storage.capacity,
            pool_id=storage.pool_id,
            fresh=storage.fresh,
            key_memory=self._key_memory,
            profile=self._pacing.profile.name,
        )

    def health(self) -> None:
        """Read the pool's header."""
        self._storage.health()

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
        """Keep the array ``tiles`` itself, for as long as the segment is loaded."""
        if tiles.shape != segment.shape or tiles.dtype != np.uint8:
            raise ValueError(f"tiles {list(tiles.shape)} are not those of a segment {list(segment.shape)}")
        others = sum(held.nbytes for offset, held in self._keys.items() if offset != segment.offset)
        if others + tiles.nbytes > self._key_memory:
            raise MemoryError(f"{tiles.nbytes} bytes of evaluation keys do not fit beside {others}")
        started = self._pacing.now()
        self._keys[segment.offset] = tiles
        self._pacing.load(started, tiles.nbytes)

    def unload_keys(self, offset: int) -> None:
        """Drop the array."""
        self._keys.pop(offset, None)

    def held_keys(self, offset: int) -> U8 | None:
        """Return the array, unless scans are to take a modelled device's time."""
        return self._keys.get(offset) if self._pacing.profile is NONE else None

    def row_source(self) -> RowSource | None:
        """Return the pool, unless reads are to take a modelled device's time."""
        return self._storage.row_source() if self._pacing.profile is NONE else None

    def evaluate(self, scan: Scan) -> Winners:
        """Rank tiles where they are, or as they come from the pool."""
        found: list[Ranked] = []
        run: list[tuple[KeySegment, U8]] = []
        parts: list[tuple[int, bool]] = []
        started = self._pacing.now()
        for segment, tiles, streamed in self._tiles(overlapping(scan)):
            parts.append((_scanned(scan, segment, streamed), streamed))
            if not streamed:
                run.append((segment, tiles))
                continue
            if run:
                found.append(_rank(scan, run))
                run = []
            # Ranked at once: its buffer is filled again with the segment after the next.
            found.append(_rank(scan, [(segment, tiles)], verify=True))
        if run:
            found.append(_rank(scan, run))
        self._pacing.evaluate(started, parts)
        if not found:
            nothing = np.empty((scan.q.shape[0], 0), np.uint32)
            none = np.zeros((scan.q.shape[0], HISTOGRAM_BINS), np.uint32) if scan.histogram else None
            return Winners(nothing, nothing.astype(np.int32), 0, 0, none)
        best = found[0] if len(found) == 1 else kernel.merge(found, scan.k)
        scanned = sum(nbytes for nbytes, _ in parts)
        read = sum(nbytes for nbytes, streamed in parts if streamed)
        return Winners(best.ids, best.scores, scanned, read, best.histogram)

    def close(self) -> None:
        """Close the pool."""
        self._ahead.shutdown()
        self._storage.close()

    def _tiles(self, segments: Sequence[KeySegment]) -> Iterator[tuple[KeySegment, U8, bool]]:
        """Yield each segment, its tiles (valid until the next is asked for), and whether they were read."""
        wanted = [segment for segment in segments if segment.offset not in self._keys]
        coming: list[Future[U8]] = []
        try:
            for index in range(min(1, len(wanted))):
                coming.append(self._ahead.submit(self._fetch, wanted[index], index % 2))
            taken = 0
            for segment in segments:
                held = self._keys.get(segment.offset)
                if held is not None:
                    yield segment, held, False
                    continue
                tiles = coming.pop().result()
                taken += 1
                if taken < len(wanted):
                    coming.append(self._ahead.submit(self._fetch, wanted[taken], taken % 2))
                yield segment, tiles, True
        finally:
            # The buffers are free for the next scan only when nothing is on its way to them.
            for future in coming:
                future.exception()

    def _fetch(self, segment: KeySegment, side: int) -> U8:
        there = self._storage.in_memory(segment.offset, segment.nbytes)
        if there is not None:
            return there.reshape(segment.shape)
        padded = -(-segment.nbytes // PAGE) * PAGE
        if self._buffers[side].size < padded:
            self._buffers[side] = aligned(padded)
        buffer = self._buffers[side][:padded]
        self._storage.read_unpaced(segment.offset, buffer)
        return buffer[: segment.nbytes].reshape(segment.shape)


def _scanned(scan: Scan, segment: KeySegment, streamed: bool) -> int:
    # What is read is looked at as a whole, for its checksum.
    if streamed:
        return segment.nbytes
    low = max(scan.first, segment.first_token) // TILE_TOKENS
    high = -(-min(scan.end, segment.end_token) // TILE_TOKENS)
    return segment.nbytes // (segment.tokens // TILE_TOKENS) * (high - low)


def _rank(scan: Scan, run: list[tuple[KeySegment, U8]], *, verify: bool = False) -> Ranked:
    """Rank segments that follow one another; raises :class:`DamagedKeys` if one to verify is damaged."""
    origin, end = run[0][0].first_token, run[-1][0].end_token
    ranked = kernel.rank(
        [tiles for _, tiles in run],
        scan.q,
        run[0][0].precision,
        max(scan.first, origin),
        min(scan.end, end),
        scan.k,
        offsets=scan.offsets,
        origin=origin,
        histogram=scan.histogram,
        checksums=verify,
    )
    if ranked.checksums is not None:
        for (segment, _), sums in zip(run, ranked.checksums, strict=True):
            if tuple(sums.tolist()) != segment.checksums:
                raise DamagedKeys(segment)
    return ranked
