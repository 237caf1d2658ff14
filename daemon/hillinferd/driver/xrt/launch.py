"""One run of the evaluation kernel: its arguments and the words it writes (hls/evaluate.hpp)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hillinfer_core.errors import DeviceUnavailable
from hillinfer_core.layout import Precision, tile_bytes
from hillinfer_core.reference import HISTOGRAM_BINS, I32, U32

from .runtime import explained, reset

WORD = 64
PAIRS = 8
HISTOGRAM_BYTES = HISTOGRAM_BINS * 4
"""Bytes of a word, (id, score) pairs of a word, bytes of a head's histogram: hls/evaluate.hpp."""

STATUS_OK, STATUS_BAD_ARGUMENT = 0, 1
"""Status in a summary: hls/evaluate.hpp."""

NOT_WRITTEN = b"\xff\xff\xff\xff"
"""A status that no kernel gives, put into summaries before a run."""

COMPLETED, SUBMITTED = 4, 7
"""States of a run; 4 and above mean that it is over, but for 7 (vendor's documents)."""

DEADLINE_S = 10.0
"""Longest that a run may take once those before it are over. Our choice: all of the card's 4 GB take 0.3 s at
the DRAM's rate (vendor), or 2 s with 8 query vectors."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 20e-6, 1e-3
"""Between two looks at a run's state. Our choice."""

# Arguments of the kernel, in order: five buffers, then the scalars of Launch.scalars.
KEYS, QUERIES, BLOCKS, HISTOGRAMS, SUMMARIES, FIRST_SCALAR = range(6)


@dataclass(frozen=True)
class Launch:
    """Rank tokens ``begin .. end - 1`` of keys that have ``heads`` heads of ``tiles`` tiles.

    Tokens are counted from the first of the keys, whose id is ``first_id``; ``vectors`` are query vectors of
    a head. The best ``k`` are found.
    """

    precision: Precision
    heads: int
    tiles: int
    dim: int
    vectors: int
    begin: int
    end: int
    k: int
    first_id: int

    @property
    def chosen(self) -> int:
        """(id, score) pairs of a head."""
        return min(self.k, self.end - self.begin)

    @property
    def block_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.heads * -(-self.chosen // PAIRS) * WORD

    @property
    def summary_bytes(self) -> int:
        """Bytes of all summaries."""
        return self.heads * WORD

    def scalars(self) -> list[int]:
        """Return the scalar arguments; pyxrt takes int32 only, the kernel reads the same bits as unsigned."""
        stride = self.tiles * tile_bytes(self.dim, self.precision) // WORD
        values = (
            self.heads, stride, self.tiles, self.begin, self.end, self.dim, self.vectors, self.chosen,
            self.first_id,
        )  # fmt: skip
        return [value - (1 << 32) if value >= 1 << 31 else value for value in values]


@dataclass(frozen=True)
class Found:
    """What a run found: ``ids`` and ``scores`` [heads, chosen], ``checksums`` uint32 [heads]."""

    ids: U32
    scores: I32
    checksums: U32


def query_words(q: npt.NDArray[Any], offsets: I32 | None) -> bytes:
    """Return each head's offsets, int32 [heads, vectors] or None for zeros, then its vectors of ``q``.

    ``q`` is int8 or int16 [heads, vectors, dim]; the offsets, and each vector, are filled up to whole words.
    """
    heads, vectors, dim = q.shape
    first = np.zeros((heads, WORD // 4), "<i4")
    if offsets is not None:
        first[:, :vectors] = offsets
    in_word = WORD // q.itemsize
    rest = np.zeros((heads, vectors, -(-dim // in_word) * in_word), q.dtype.newbyteorder("<"))
    rest[:, :, :dim] = q
    return np.concatenate((first.view(np.uint8), rest.reshape(heads, -1).view(np.uint8)), axis=1).tobytes()


def wait(run: Any, card: str) -> None:
    """Return when ``run`` has completed; raises :class:`Hung` at the deadline.

    By polling: the runtime's own wait holds the GIL, and not always to its limit (vendor's binding).
    """
    pause, deadline = FIRST_PAUSE_S, time.monotonic() + DEADLINE_S
    while True:
        with explained(card, "asking for a run's state"):
            state = int(run.state())
        if state >= COMPLETED and state != SUBMITTED:
            break
        if time.monotonic() > deadline:
            raise Hung(
                f"card {card}: a run of the kernel has not ended after {DEADLINE_S:g} s; "
                f"reset the card with `{reset(card)}`, then restart the daemon"
            )
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
    if state != COMPLETED:
        raise DeviceUnavailable(
            f"card {card}: a run of the kernel ended in state {state}; reset the card with `{reset(card)}` "
            "(a tripped firewall shows in `xbutil examine`)"
        )


class Hung(DeviceUnavailable):
    """A run did not end: the card may still write to its buffers."""


def parse(launch: Launch, blocks: bytes, summaries: bytes, card: str) -> Found:
    """Return what a run wrote; raises :class:`DeviceUnavailable` for words that it cannot have written."""
    words = np.frombuffer(summaries, "<u4").reshape(launch.heads, WORD // 4)
    if words[0, 0] == STATUS_BAD_ARGUMENT:
        raise DeviceUnavailable(
            f"card {card}: the kernel refuses its arguments: the bitstream is not of this version; "
            "build it from this version's hls/ and load it with hillinferctl cec load"
        )
    pairs = np.frombuffer(blocks, "<u4").reshape(launch.heads, -1, 2)[:, : launch.chosen]
    ids, scores = pairs[:, :, 0].astype(np.uint32), pairs[:, :, 1].astype(np.uint32).view(np.int32)
    # All that can be checked without the keys: a torn result is refused, not used.
    places = ids.astype(np.int64) - launch.first_id
    whole = (
        (words[:, 0] == STATUS_OK).all()
        and (words[:, 1] == launch.chosen).all()
        and (places >= launch.begin).all()
        and (places < launch.end).all()
        and (np.diff(places, axis=1) > 0).all()
        and np.array_equal(scores.min(axis=1), words[:, 5].view(np.int32))
    )
    if not whole:
        raise DeviceUnavailable(
            f"card {card}: the result of a run is torn; try again, and reset the card with `{reset(card)}` "
            "if it comes back"
        )
    return Found(ids, scores, words[:, 2].astype(np.uint32))


def start(run: Any, launch: Launch, buffers: list[Any], card: str) -> None:
    """Start ``run`` on ``buffers``, which are keys, queries, blocks, histograms and summaries."""
    with explained(card, "starting a run"):
        # Not by calling the kernel: that skips a bad argument in silence.
        for index, buffer in enumerate(buffers):
            run.set_arg(index, buffer)
        for index, value in enumerate(launch.scalars(), start=FIRST_SCALAR):
            run.set_arg(index, value)
        run.start()
