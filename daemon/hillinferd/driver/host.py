"""The host driver: a pool on a file or drive, and evaluation on the host's cores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hillinfer_core import kernel
from hillinfer_core.layout import PAGE, TILE_TOKENS
from hillinfer_core.reference import U8, U32

from .contract import Bytes, DamagedKeys, Identity, KeySegment, Scan, Winners
from .pacing import Pacing
from .profiles import profile
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
            Path(settings.path), settings.capacity, keep=settings.keep, direct=direct, pacing=self._pacing
        )
        self._keys: dict[int, U8] = {}
        self._ahead = ThreadPoolExecutor(1, "hillinferd-read-ahead")
        self._buffers = [aligned(0), aligned(0)]
        self._scores = np.empty(0, np.int32)

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

    def evaluate(self, scan: Scan) -> Winners:
        """Score tiles where they are, or as they come from the pool; then select."""
        heads = scan.q.shape[0]
        origin = scan.first // TILE_TOKENS * TILE_TOKENS
        segments = overlapping(scan)
        columns = max(0, -(-scan.end // TILE_TOKENS) * TILE_TOKENS - origin)
        if self._scores.size < heads * columns:
            self._scores = np.empty(heads * columns, np.int32)
        scores = self._scores[: heads * columns].reshape(heads, columns)
        parts: list[tuple[int, bool]] = []
        started = self._pacing.now()
        for segment, tiles, streamed in self._tiles(segments):
            low = max(origin, segment.first_token)
            high = min(origin + columns, segment.end_token)
            begin = (low - segment.first_token) // TILE_TOKENS
            part = tiles[:, begin : begin + (high - low) // TILE_TOKENS]
            kernel.scores(part, scan.q, segment.precision, scores[:, low - origin : high - origin])
            # What is read is looked at as a whole, for its checksum.
            parts.append((segment.nbytes if streamed else part.size, streamed))
        ids, best = kernel.top_k(scores[:, scan.first - origin : scan.end - origin], scan.k, scan.first)
        self._pacing.evaluate(started, parts)
        scanned = sum(nbytes for nbytes, _ in parts)
        return Winners(ids, best, scanned, sum(nbytes for nbytes, streamed in parts if streamed))

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
                if not np.array_equal(key_checksums(tiles), np.array(segment.checksums, np.uint32)):
                    raise DamagedKeys(segment)
                yield segment, tiles, True
        finally:
            # The buffers are free for the next scan only when nothing is on its way to them.
            for future in coming:
                future.exception()

    def _fetch(self, segment: KeySegment, side: int) -> U8:
        padded = -(-segment.nbytes // PAGE) * PAGE
        if self._buffers[side].size < padded:
            self._buffers[side] = aligned(padded)
        buffer = self._buffers[side][:padded]
        self._storage.read_unpaced(segment.offset, buffer)
        return buffer[: segment.nbytes].reshape(segment.shape)


def key_checksums(tiles: U8) -> U32:
    """Return the data checksum (docs/evaluation.md), uint32 [kv_heads], of ``tiles``."""
    return kernel.data_checksums(tiles)
