"""Large work in pieces, so that nobody's decode waits for more than one of them.

Estimates are in seconds of one device, the SmartSSD of the vendor's figures, whatever drive there is: they
only say where to cut and what is small. What a session is charged is measured when a piece has run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import overload

from hillinfer_core.layout import Shape
from hillinfer_core.packed import Item

from ..domain.extents import Extent
from ..domain.regions import Region
from ..driver.profiles import SMARTSSD
from ..worker import messages
from . import requests
from .admission import ID_BYTES, scan_bytes
from .work_queue import Priority

PIECE_S = 5e-3
"""Longest piece, of those that can be cut: about what a decode step of another has to wait. Our choice."""

DISCARD_BYTES = 16 << 20
"""Bytes discarded at a time: some 5 ms in a file in memory, where it is slowest. Our choice."""

_ROW_S = 1 / SMARTSSD.read_iops

_HELD_BYTE_S = 3e-9
"""Seconds to look through a byte of the ids held: 512 MiB took 1.4 s on a core of an AMD EPYC, 2026-11-25."""

_BYTE_S = 1 / min(SMARTSSD.nand_read, SMARTSSD.host_read)


def priority_of(ask: requests.FetchIds | requests.FetchRange | requests.FetchTail) -> Priority:
    """Say whether a fetch is small enough to go with decode; from numbers that were not checked."""
    estimate = ask.rows.length * _BYTE_S
    if isinstance(ask, requests.FetchIds):
        estimate = max(estimate, sum(ask.count_per_head) * _ROW_S)
    return Priority.decode if estimate <= PIECE_S else Priority.bulk


def of_evaluate(request: messages.Evaluate, shapes: Sequence[Shape]) -> list[messages.Evaluate]:
    """Cut between evaluations; ``shapes`` are those of their contexts."""
    if len(request.evaluations) == 1:
        return [request]
    pieces: list[list[Item]] = []
    spent = PIECE_S
    for item, shape in zip(request.evaluations, shapes, strict=True):
        scanned = scan_bytes(shape, item.first_token, item.end_token, request.query_heads, request.reduction)
        seconds = scanned / SMARTSSD.scan + item.held.length * _HELD_BYTE_S
        seconds += min(item.k * shape.kv_heads, item.rows.length // shape.row_bytes) * _ROW_S
        if spent + seconds > PIECE_S:
            pieces.append([])
            spent = 0.0
        pieces[-1].append(item)
        spent += seconds
    if len(pieces) == 1:
        return [request]
    return [request._replace(evaluations=items, packed=b"") for items in pieces]


class OfIds(Sequence[messages.FetchIds]):
    """A fetch by ids, cut: rows in the order of the ids. Each piece is made when it is asked for.

    There may be thousands, and whoever carries them out cuts anew for each.
    """

    def __init__(self, request: messages.FetchIds, row_bytes: int) -> None:
        self._request = request
        self._row_bytes = row_bytes
        self._most = max(1, int(PIECE_S / max(_ROW_S, row_bytes * _BYTE_S)))
        self._ends = [0, *accumulate(request.count_per_head)]

    def __len__(self) -> int:
        return -(-self._ends[-1] // self._most)

    @overload
    def __getitem__(self, index: int) -> messages.FetchIds: ...
    @overload
    def __getitem__(self, index: slice) -> list[messages.FetchIds]: ...
    def __getitem__(self, index: int | slice) -> messages.FetchIds | list[messages.FetchIds]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        first = range(len(self))[index] * self._most
        end = min(first + self._most, self._ends[-1])
        inside = [min(max(reached, first), end) for reached in self._ends]
        whole, count = self._request, end - first
        return replace(
            whole,
            count_per_head=[high - low for low, high in pairwise(inside)],
            ids=Region(whole.ids.offset + first * ID_BYTES, count * ID_BYTES),
            rows=Region(whole.rows.offset + first * self._row_bytes, count * self._row_bytes),
        )


def of_range(request: messages.FetchRange, shape: Shape) -> list[messages.FetchRange]:
    """Cut a fetch of a run of tokens: each piece has some tokens of every head."""
    most = max(1, int(PIECE_S / _BYTE_S) // (shape.kv_heads * shape.row_bytes))
    return [
        replace(
            request,
            first_token=request.first_token + skipped,
            count=min(most, request.count - skipped),
            room=request.count,
            skipped=skipped,
        )
        for skipped in range(0, request.count, most)
    ]


def of_extents(extents: Sequence[Extent]) -> list[Extent]:
    """Cut what is to be discarded."""
    return [
        Extent(offset, min(DISCARD_BYTES, extent.end - offset))
        for extent in extents
        for offset in range(extent.offset, extent.end, DISCARD_BYTES)
    ]
