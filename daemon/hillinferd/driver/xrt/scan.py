"""Carries out scans on the card: keys from its memory or streamed from the drive, several runs in flight."""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hillinfer_core import kernel
from hillinfer_core.errors import DeviceUnavailable, InvalidInput
from hillinfer_core.layout import PAGE, TILE_TOKENS
from hillinfer_core.reference import U32

from ...cec.configurable import Outcome, Vector
from ...cec.configurations import SHIPPED
from ..contract import DamagedKeys, KeySegment, Scan, Winners
from ..segments import overlapping
from .buffers import Buffer, Scratch
from .card import Card
from .launch import HISTOGRAM_BYTES, NOT_WRITTEN, Found, Hung, Launch, parse, query_words, start, wait
from .residency import Residency
from .runtime import explained
from .transfer import Reader

LANES = 16
"""Runs in flight: the next is queued on the card while results of the last are read. Our choice."""

STREAMED = 2
"""Buffers that keys are streamed into: one is filled while the other is scanned."""

STREAM_BYTES = 16 << 20
"""Bytes of such a buffer at first; it grows with the largest segment streamed. Our choice."""


@dataclass(frozen=True)
class Lane:
    """What one run in flight writes to."""

    blocks: Scratch
    summaries: Scratch


@dataclass(frozen=True)
class Running:
    """A run that was started, and what it borrows."""

    launch: Launch
    segment: KeySegment
    run: Any
    lane: Lane
    stream: Scratch | None


class Scanner:
    """The evaluation kernels of a loaded bitstream with the card's memory they work on.

    ``key_capacity`` are bytes for loaded keys. With ``p2p`` the drive reads into the card's memory; else keys
    pass through the host's. After a run that hung every call raises :class:`DeviceUnavailable`.
    """

    def __init__(
        self, card: Card, kernels: dict[str, Any], group: int, reader: Reader, *, p2p: bool, key_capacity: int
    ) -> None:
        self.p2p = p2p
        self._card, self._kernels, self._group, self._reader = card, kernels, group, reader
        self.residency = Residency(key_capacity, lambda size: Buffer(card, size, group, p2p=p2p))
        self._hung = ""
        # No methods of this object: in a cycle with it, kernels and buffers would wait for the collector.
        streamable = partial(_make, card, group, self.residency, p2p=p2p)
        # Never P2P: the processor reads results, and reads over PCIe one word at a time.
        plain = partial(_make, card, group, self.residency, p2p=False)
        # The room for work first; keys get what is left.
        self._streams = [Scratch(streamable, STREAM_BYTES) for _ in range(STREAMED)]
        self._queries, self._histograms = Scratch(plain, PAGE), Scratch(plain, PAGE)
        self._lanes = [Lane(Scratch(plain, PAGE), Scratch(plain, PAGE)) for _ in range(LANES)]

    @property
    def hung(self) -> bool:
        """Whether a run hung: the card may still write to its buffers."""
        return bool(self._hung)

    def check(self) -> None:
        """Raise if a run hung before."""
        if self._hung:
            raise DeviceUnavailable(self._hung)

    def evaluate(self, scan: Scan) -> Winners:
        """Carry out ``scan``; see :class:`~hillinferd.driver.contract.Driver`."""
        self.check()
        if scan.histogram:
            raise InvalidInput("this drive's card cannot serve min_mass yet: ask for a budget instead")
        heads = scan.q.shape[0]
        segments = overlapping(scan) if scan.first < scan.end else []
        if not segments:
            return Winners(np.empty((heads, 0), np.uint32), np.empty((heads, 0), np.int32), 0, 0)
        jobs = [(segment, _launch(scan, segment)) for segment in segments]
        self._fit(jobs)
        words = query_words(scan.q, scan.offsets)
        _put(self._queries.fit(len(words)), words)
        found, read = self._run_all(jobs)
        ids = np.concatenate([part.ids for part in found], axis=1)
        scores = np.ascontiguousarray(np.concatenate([part.scores for part in found], axis=1))
        # Columns ascend with the ids, so that of equal scores the lowest id wins here too.
        columns, best = kernel.top_k(scores, scan.k, 0)
        winners: U32 = np.take_along_axis(ids, columns.astype(np.int64), axis=1)
        return Winners(winners, best, sum(segment.nbytes for segment in segments), read)

    def run_vector(self, name: str, vector: Vector) -> Outcome:
        """Run the kernel ``name`` on a vector of the self-test and return every word that it computed."""
        self.check()
        heads, tiles, _ = vector.tiles.shape
        _, vectors, dim = vector.q.shape
        launch = Launch(
            vector.precision, heads, tiles, dim, vectors, vector.begin, vector.end, vector.k, vector.first_id
        )
        _check(launch)
        keys, lane = self._streams[0].fit(vector.tiles.nbytes), self._lanes[0]
        _put(keys, vector.tiles.tobytes())
        words = query_words(vector.q, vector.offsets)
        _put(self._queries.fit(len(words)), words)
        run = self._start(name, launch, keys, lane)
        found = self._result(launch, run, lane)
        histograms = self._histograms.buffer
        histograms.from_card(heads * HISTOGRAM_BYTES)
        counts = np.frombuffer(bytes(histograms.view[: heads * HISTOGRAM_BYTES]), "<u4")
        return Outcome(found.ids, found.scores, counts.reshape(heads, -1).astype(np.uint32), found.checksums)

    def close(self) -> None:
        """Give the kernels and all of the card's memory back.

        XRT refuses another bitstream while a compute unit of the old one is open.
        """
        self._kernels = {}
        self.residency.close()
        for lane in self._lanes:
            lane.blocks.close()
            lane.summaries.close()
        for scratch in (*self._streams, self._queries, self._histograms):
            scratch.close()

    def _run_all(self, jobs: list[tuple[KeySegment, Launch]]) -> tuple[list[Found], int]:
        """Return what each job found, in order, and the bytes streamed."""
        running: deque[Running] = deque()
        # From the left, as the first are those that were made large enough.
        lanes, streams = deque(self._lanes), deque(self._streams)
        found: list[Found] = []
        read = 0

        def collect() -> None:
            job = running.popleft()
            found.append(self._collect(job))
            lanes.append(job.lane)
            if job.stream is not None:
                streams.append(job.stream)

        try:
            for segment, launch in jobs:
                keys, stream = self.residency.find(segment), None
                while not lanes or (keys is None and not streams):
                    collect()
                if keys is None:
                    stream = streams.popleft()
                    keys, length = stream.buffer, _padded(segment)
                    assert length <= keys.size
                    with keys.view[:length] as view:
                        self._reader.fill(view, segment.offset)
                    keys.to_card(length)
                    read += segment.nbytes
                lane = lanes.popleft()
                run = self._start(f"evaluate_{segment.precision}", launch, keys, lane)
                running.append(Running(launch, segment, run, lane, stream))
            while running:
                collect()
        finally:
            self._drain(running)
        return found, read

    def _collect(self, job: Running) -> Found:
        found = self._result(job.launch, job.run, job.lane)
        if found.checksums.tolist() != list(job.segment.checksums):
            # If it was loaded, what is in the pool may still be whole.
            self.residency.unload(job.segment.offset)
            raise DamagedKeys(job.segment)
        return found

    def _drain(self, running: deque[Running]) -> None:
        # A buffer must not be used again, nor given back, while a run may write to it.
        while running and not self._hung:
            with contextlib.suppress(DeviceUnavailable):  # what came first is being raised already
                self._wait(running.popleft().run)

    def _start(self, name: str, launch: Launch, keys: Buffer, lane: Lane) -> Any:
        kernel_object = self._kernel(name)
        with explained(self._card.bdf, "preparing a run"):
            run = self._card.xrt.run(kernel_object)
        blocks, summaries = lane.blocks.fit(launch.block_bytes), lane.summaries.fit(launch.summary_bytes)
        histograms = self._histograms.fit(launch.heads * HISTOGRAM_BYTES)
        # So that what an earlier run wrote cannot be taken for what this one did.
        summaries.view[: launch.summary_bytes] = NOT_WRITTEN * (launch.summary_bytes // len(NOT_WRITTEN))
        summaries.to_card(launch.summary_bytes)
        queries = self._queries.buffer
        buffers = [buffer.bo for buffer in (keys, queries, blocks, histograms, summaries)]
        start(run, launch, buffers, self._card.bdf)
        return run

    def _result(self, launch: Launch, run: Any, lane: Lane) -> Found:
        self._wait(run)
        read = []
        for scratch, length in ((lane.blocks, launch.block_bytes), (lane.summaries, launch.summary_bytes)):
            buffer = scratch.buffer
            buffer.from_card(length)
            read.append(bytes(buffer.view[:length]))
        return parse(launch, read[0], read[1], self._card.bdf)

    def _wait(self, run: Any) -> None:
        try:
            wait(run, self._card.bdf)
        except Hung as error:
            self._hung = str(error)
            raise

    def _kernel(self, name: str) -> Any:
        if name not in self._kernels:
            has = ", ".join(self._kernels) or "none"
            raise DeviceUnavailable(
                f"card {self._card.bdf}: the bitstream has no kernel {name} (it has {has}); "
                "load one that has with hillinferctl cec load"
            )
        return self._kernels[name]

    def _fit(self, jobs: list[tuple[KeySegment, Launch]]) -> None:
        """Make every buffer large enough while nothing runs: to find room, loaded keys may be forgotten."""
        for segment, launch in jobs:
            _check(launch)
            self._kernel(f"evaluate_{segment.precision}")
        for lane in self._lanes[: len(jobs)]:
            lane.blocks.fit(max(launch.block_bytes for _, launch in jobs))
            lane.summaries.fit(max(launch.summary_bytes for _, launch in jobs))
        self._histograms.fit(max(launch.heads for _, launch in jobs) * HISTOGRAM_BYTES)
        loaded = -1
        while loaded != self.residency.used:
            loaded = self.residency.used
            streamed = [_padded(segment) for segment, _ in jobs if self.residency.find(segment) is None]
            for stream in self._streams[: len(streamed)]:
                stream.fit(max(streamed))


def _make(card: Card, group: int, residency: Residency, size: int, *, p2p: bool) -> Buffer:
    while True:
        try:
            return Buffer(card, size, group, p2p=p2p)
        except MemoryError:
            if not residency.make_room():
                raise DeviceUnavailable(
                    f"card {card.bdf}: its memory has no room for {size} bytes; end other programs "
                    "that use the card, or use a smaller budget"
                ) from None


def _launch(scan: Scan, segment: KeySegment) -> Launch:
    heads, tiles, _ = segment.shape
    if scan.q.shape[0] != heads or scan.q.shape[2] != segment.head_dim:
        raise ValueError(f"a query {list(scan.q.shape)} is not for keys of {heads} x {segment.head_dim}")
    return Launch(
        precision=segment.precision,
        heads=heads,
        tiles=tiles,
        dim=segment.head_dim,
        vectors=scan.q.shape[1],
        begin=max(scan.first - segment.first_token, 0),
        end=min(scan.end, segment.end_token) - segment.first_token,
        k=max(scan.k, 1),  # the kernel takes no 0, and keys are to be checked all the same
        first_id=segment.first_token,
    )


def _check(launch: Launch) -> None:
    limits = SHIPPED[0]
    if launch.vectors > limits.max_vectors:
        raise InvalidInput(
            f"the card takes the greatest of at most {limits.max_vectors} query vectors, "
            f"not {launch.vectors}; use reduction sum"
        )
    if launch.tiles * TILE_TOKENS > limits.max_tokens:
        raise InvalidInput(
            f"the card scans segments of at most {limits.max_tokens} tokens, not {launch.tiles * TILE_TOKENS}"
        )


def _padded(segment: KeySegment) -> int:
    return -(-segment.nbytes // PAGE) * PAGE


def _put(buffer: Buffer, data: bytes) -> None:
    buffer.view[: len(data)] = data
    buffer.to_card(len(data))
