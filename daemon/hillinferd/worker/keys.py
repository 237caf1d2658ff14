"""Evaluation keys: sealed into the pool, kept in fast memory as far as it goes, made anew when damaged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from hillinfer_core import kernel
from hillinfer_core.errors import CorruptData, HillInferError, MemoryLimit
from hillinfer_core.exchange import HeldKeys
from hillinfer_core.layout import PAGE, TILE_TOKENS, Shape
from hillinfer_core.reference import I32, U8, U32, Q
from hillinfer_core.units import format_bytes

from ..domain.contexts import key_bytes
from ..domain.placement import Placed
from ..domain.quantisation import Quantisation, SealedKeys
from ..domain.residency import Residency
from ..driver.contract import DamagedKeys, Driver, KeySegment, Scan, Winners
from ..logs import get_logger
from . import rows
from .messages import Traffic
from .store import LayerStore, Segment, empty_tiles, lazy

log = get_logger(__name__)


class Ranking(NamedTuple):
    """Rank tokens ``first .. end - 1`` of a layer for ``q``; the best ``k``; see ``driver.contract.Scan``."""

    q: Q
    first: int
    end: int
    k: int
    histogram: bool = False
    offsets: I32 | None = None


class KeyKeeper:
    """All evaluation keys of a worker. Blocks; one thread only."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.residency = Residency(driver.identify().key_memory)

    def put(self, store: LayerStore, segments: list[Segment], first_token: int, tiles: U8) -> None:
        """Copy ``tiles`` [kv_heads, n / 16, tile bytes] of new tokens to the unsealed ``segments``.

        Call :meth:`make_room` first.
        """
        end = first_token + tiles.shape[1] * TILE_TOKENS
        for segment in segments:
            start = segment.placed.first_token
            low, high = max(first_token, start), min(end, segment.placed.end_token)
            if low < high and segment.sealed is None:
                if segment.tiles is None:
                    segment.tiles = empty_tiles(store.shape, segment.placed.stride)
                source = tiles[:, (low - first_token) // TILE_TOKENS : (high - first_token) // TILE_TOKENS]
                segment.tiles[:, (low - start) // TILE_TOKENS : (high - start) // TILE_TOKENS] = source

    def make_room(self, store: LayerStore, tokens: int) -> None:
        """Take room for the keys of ``tokens`` more unsealed tokens; raises :class:`MemoryLimit`."""
        out = self.residency.grow_unsealed(key_bytes(store.shape, tokens))
        if out is None:
            raise MemoryLimit(
                f"evaluation keys not yet written to the pool hold "
                f"{format_bytes(self.residency.unsealed_bytes)} of {format_bytes(self.residency.capacity)}; "
                "close contexts, use int4, or raise evaluation_keys_dram"
            )
        for offset in out:
            self._driver.unload_keys(offset)

    def give_room_back(self, store: LayerStore, tokens: int) -> None:
        """Undo :meth:`make_room`."""
        self.residency.shrink_unsealed(key_bytes(store.shape, tokens))

    def write(self, store: LayerStore, placed: Placed, tiles: U8, traffic: Traffic) -> SealedKeys:
        """Write ``tiles`` [kv_heads, n / 16, tile bytes] to their extent; they count once they are sealed."""
        padded = _padded(tiles)
        self._driver.write(placed.keys_offset(store.shape), padded.data)
        traffic.written += padded.size
        checksums = _checksums(tiles)
        return SealedKeys(placed.first_token, tiles.shape[1] * TILE_TOKENS, checksums)

    def write_unsealed(
        self, store: LayerStore, segment: Segment, end: int, traffic: Traffic
    ) -> tuple[Segment, SealedKeys, U8]:
        """Write the segment's keys up to token ``end``; give the result to :meth:`seal` when all is done."""
        assert segment.tiles is not None
        tokens = min(segment.placed.end_token, end) - segment.placed.first_token
        # A whole segment is nearly always what is sealed: it is complete, and nobody writes to it any more.
        tiles = segment.tiles if tokens == segment.placed.stride else _packed(segment.tiles, tokens)
        return segment, self.write(store, segment.placed, tiles, traffic), tiles

    def seal(self, store: LayerStore, segment: Segment, sealed: SealedKeys, tiles: U8) -> None:
        """Count keys that were written as sealed; they stay in fast memory if there is room."""
        self.give_room_back(store, sealed.tokens)
        segment.seal(store.shape, sealed)
        assert segment.sealed is not None
        self._load(segment.sealed, tiles)

    def forget(self, segment: KeySegment) -> None:
        """Take a segment's keys out of fast memory."""
        self.residency.forget(segment.offset)
        self._driver.unload_keys(segment.offset)

    def drop(self, store: LayerStore) -> None:
        """Forget all keys that only ``store`` uses."""
        for segment in store.segments:
            if segment.sealed and not segment.shared:
                self.forget(segment.sealed)
        self.give_room_back(store, store.tokens - min(store.sealed_end, store.tokens))

    def claimed_bytes(self, stores: Iterable[LayerStore]) -> int:
        """Bytes of the layers' keys in fast memory, counting those that will come in when they are ranked.

        A client divides its memory by this number and asks for no other before it ranks.
        """
        claimed, room = 0, self.residency.capacity - self.residency.used_bytes
        for store in stores:
            claimed += key_bytes(store.shape, store.tokens - min(store.sealed_end, store.tokens))
            for item in (segment.sealed for segment in store.segments if segment.sealed):
                loaded = self.residency.is_loaded(item.offset)
                if loaded or item.nbytes <= room:
                    claimed += item.nbytes
                    room -= 0 if loaded else item.nbytes
        return claimed

    def held(self, store: LayerStore, first: int, end: int) -> HeldKeys | None:
        """Return the keys of tokens ``first .. end - 1`` if all are where the host can rank them at once."""
        parts: list[U8] = []
        origin = reached = 0
        for segment in store.segments:
            placed, sealed = segment.placed, segment.sealed
            if placed.first_token >= end:
                break
            tokens = sealed.tokens if sealed else placed.stride
            if placed.first_token + tokens <= first:
                continue
            tiles = self._driver.held_keys(sealed.offset) if sealed else segment.tiles
            if tiles is None or (parts and placed.first_token != reached):
                return None
            if not parts:
                origin = placed.first_token
            parts.append(tiles)
            reached = placed.first_token + tokens
        held = HeldKeys(parts, origin, store.shape.precision.bits)
        return held if parts and origin <= first and end <= reached else None

    def rank(self, store: LayerStore, ask: Ranking, traffic: Traffic) -> Winners:
        """Carry out ``ask``; damaged keys are made anew from the rows, once.

        Raises :class:`CorruptData` if that does not help, ``OSError`` from the drive.
        """
        parts = []
        boundary = min(ask.end, max(ask.first, store.sealed_end))
        if ask.first < boundary:
            parts.append(self._rank_sealed(store, ask, boundary, traffic))
        if boundary < ask.end:
            parts.append(_rank_unsealed(store, ask, boundary))
        traffic.evaluated += sum(part.scanned for part in parts)
        traffic.streamed += sum(part.read for part in parts)
        traffic.read += sum(part.read for part in parts)
        return parts[0] if len(parts) == 1 else _joined(parts, ask.k)

    def tiles(self, store: LayerStore, first: int, end: int, traffic: Traffic) -> U8:
        """Return a copy of the keys [kv_heads, n / 16, tile bytes] of tokens ``first .. end - 1``.

        Sealed ones are read a segment at a time, as their checksum is of all of it. Raises as :meth:`rank`.
        """
        parts = []
        for segment in store.segments:
            start = segment.placed.first_token
            low, high = max(first, start), min(end, segment.placed.end_token)
            if low < high:
                held = self._sealed_tiles(store, segment.sealed, traffic) if segment.sealed else segment.tiles
                assert held is not None
                parts.append(held[:, (low - start) // TILE_TOKENS : (high - start) // TILE_TOKENS])
        return np.concatenate(parts, axis=1)

    def rebuild_unsealed(self, store: LayerStore, traffic: Traffic) -> None:
        """Make the keys that were unsealed when their context was last loaded, from its rows."""
        for segment in store.segments:
            tokens = min(segment.placed.end_token, store.tokens) - segment.placed.first_token
            if segment.sealed is None and tokens > 0:
                self.make_room(store, tokens)
                try:
                    tiles = self._tiles_of(store, segment.placed.first_token, tokens, traffic)
                except BaseException:
                    self.give_room_back(store, tokens)
                    raise
                self.put(store, [segment], segment.placed.first_token, tiles)

    def _rank_sealed(self, store: LayerStore, ask: Ranking, end: int, traffic: Traffic) -> Winners:
        mended: set[int] = set()
        while True:
            segments = [item.sealed for item in store.segments if item.sealed]
            inside = [item for item in segments if item.first_token < end and item.end_token > ask.first]
            try:
                for segment in inside:
                    self._bring_in(segment, traffic)
                return self._driver.evaluate(
                    Scan(inside, ask.q, ask.first, end, ask.k, ask.histogram, ask.offsets)
                )
            except DamagedKeys as damage:
                if damage.segment.offset in mended:
                    raise CorruptData(
                        f"{damage}, also after they were written again; close the context and check the drive"
                    ) from None
                mended.add(damage.segment.offset)
                log.warning("damaged evaluation keys are made anew", offset=damage.segment.offset)
                self._mend(store, damage.segment, traffic)

    def _bring_in(self, segment: KeySegment, traffic: Traffic) -> None:
        if self.residency.is_loaded(segment.offset):
            return
        if self.residency.used_bytes + segment.nbytes > self.residency.capacity:
            return
        tiles = lazy(segment.shape, np.uint8)
        traffic.read += self._driver.read(segment.offset, tiles.reshape(-1).data)
        if _checksums(tiles) != segment.checksums:
            raise DamagedKeys(segment)
        self._load(segment, tiles)

    def _sealed_tiles(self, store: LayerStore, segment: KeySegment, traffic: Traffic) -> U8:
        tiles: U8 = lazy(segment.shape, np.uint8)
        for again in (True, False):
            traffic.read += self._driver.read(segment.offset, tiles.reshape(-1).data)
            if _checksums(tiles) == segment.checksums:
                break
            if not again:
                raise CorruptData(
                    f"{DamagedKeys(segment)}, also after they were written again; close the context and "
                    "check the drive"
                )
            self._mend(store, segment, traffic)
        return tiles

    def _load(self, segment: KeySegment, tiles: U8) -> None:
        if self.residency.admit(segment.offset, segment.nbytes):
            try:
                self._driver.load_keys(segment, tiles)
            except (MemoryError, OSError, HillInferError) as error:
                # They are in the pool: what cannot be kept in memory is streamed.
                log.warning("evaluation keys are not kept in memory", offset=segment.offset, error=error)
                self.residency.forget(segment.offset)
                self._driver.unload_keys(segment.offset)

    def _mend(self, store: LayerStore, damaged: KeySegment, traffic: Traffic) -> None:
        self.forget(damaged)
        tiles = self._tiles_of(store, damaged.first_token, damaged.tokens, traffic)
        if _checksums(tiles) != damaged.checksums:
            raise CorruptData(
                f"evaluation keys of tokens {damaged.first_token} to {damaged.end_token} are damaged and the "
                "rows do not give them again; close the context, fill a new one, and check the drive"
            )
        padded = _padded(tiles)
        self._driver.write(damaged.offset, padded.data)
        traffic.written += padded.size

    def _tiles_of(self, store: LayerStore, first: int, tokens: int, traffic: Traffic) -> U8:
        assert store.quantisation is not None
        return quantised(self._driver, store, store.quantisation, first, tokens, traffic)


def scanned_bytes(shape: Shape, first: int, end: int) -> int:
    """Return the bytes of the tiles that hold tokens ``first .. end - 1`` of all heads."""
    return (-(-end // TILE_TOKENS) - first // TILE_TOKENS) * shape.kv_heads * shape.key_tile_bytes


PIECE_TOKENS = 1024
"""Tokens whose rows are read back at a time."""


def quantised(
    driver: Driver, store: LayerStore, how: Quantisation, first: int, tokens: int, traffic: Traffic
) -> U8:
    """Return the keys [kv_heads, tokens / 16, tile bytes] of tokens that are in the pool, from their rows."""
    pieces = []
    for start in range(first, first + tokens, PIECE_TOKENS):
        piece, read = rows.read_range(driver, store, start, min(PIECE_TOKENS, first + tokens - start))
        traffic.read += read
        pieces.append(kernel.quantise_keys(piece, how.ranges, store.shape.precision)[0])
    return _packed(np.concatenate(pieces, axis=1), tokens)


def _packed(tiles: U8, tokens: int) -> U8:
    """Return the tiles of the first ``tokens`` tokens in page-aligned memory."""
    heads, _, size = tiles.shape
    packed: U8 = lazy((heads, tokens // TILE_TOKENS, size), np.uint8)
    packed[:] = tiles[:, : tokens // TILE_TOKENS]
    return packed


def _padded(tiles: U8) -> U8:
    """Return the bytes of ``tiles`` in page-aligned memory, up to a whole page; no copy where they are so."""
    if tiles.flags.c_contiguous and tiles.size % PAGE == 0 and tiles.ctypes.data % PAGE == 0:
        return tiles.reshape(-1)
    padded: U8 = lazy((-(-tiles.size // PAGE) * PAGE,), np.uint8)
    padded[: tiles.size] = tiles.reshape(-1)
    return padded


def _checksums(tiles: U8) -> tuple[int, ...]:
    return tuple(kernel.data_checksums(tiles).tolist())


def _rank_unsealed(store: LayerStore, ask: Ranking, first: int) -> Winners:
    segments = [item for item in store.segments if item.tiles is not None]
    ranked = kernel.rank(
        [item.tiles for item in segments if item.tiles is not None],
        ask.q,
        store.shape.precision,
        first,
        ask.end,
        ask.k,
        offsets=ask.offsets,
        origin=segments[0].placed.first_token,
        histogram=ask.histogram,
    )
    scanned = scanned_bytes(store.shape, first, ask.end)
    return Winners(ranked.ids, ranked.scores, scanned, 0, ranked.histogram)


def _joined(parts: list[Winners], k: int) -> Winners:
    # Ascending by token, part after part: of equal scores the first is the lowest id, as top-k wants.
    ids: U32 = np.concatenate([part.ids for part in parts], axis=1)
    columns, scores = kernel.top_k(np.concatenate([part.scores for part in parts], axis=1), k, 0)
    chosen = np.take_along_axis(ids, columns.astype(np.intp), axis=1)
    counts = [part.histogram for part in parts if part.histogram is not None]
    return Winners(
        chosen,
        scores,
        sum(part.scanned for part in parts),
        sum(part.read for part in parts),
        np.sum(counts, axis=0, dtype=np.uint32) if len(counts) == len(parts) else None,
    )
