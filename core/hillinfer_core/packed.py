"""Evaluations as packed numbers: what an entry of the ring holds, and what goes on to the device worker.

A request is a header and as many items as it says, an answer one result after another; all little-endian. It
says what ``EvaluateRequest`` and ``EvaluateResponse`` of cold_pool.proto say, and each token needs one in
every layer: a protobuf message costs more to make and to read than the shortest evaluation takes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

from .errors import InvalidInput

_HEADER = struct.Struct("<IIHBxI")  # layer, query heads, items, Reduction of cold_pool.proto, generation
_ITEM = struct.Struct("<QIII14Q")  # as Item; of each region offset and length
_RESULT = struct.Struct("<IIQQdI")  # as Evaluated, KV heads in place of what is missing; then uint32 for each
_ANSWERED = struct.Struct("<d")  # answered_at; the results
_LAYER = struct.Struct("<I")
_TOKENS = struct.Struct("<II")
_FIRST_TOKEN_AT = 8  # in an item
_AFTER_TOKENS_AT = _FIRST_TOKEN_AT + _TOKENS.size
_COUNT_BYTES = 4

_KEPT = 16
"""Requests that an Unpacker knows: more than a session has kinds of them in turn. Our choice."""

T = TypeVar("T")

Tokens = tuple[int, int]
"""The first token that is ranked, and one past the last."""


class Region(NamedTuple):
    """A byte range of an arena; ``length`` 0 means that the region is not wanted."""

    offset: int
    length: int


NOT_WANTED = Region(0, 0)


class Item(NamedTuple):
    """See ``Evaluation`` in cold_pool.proto."""

    context_id: int
    first_token: int
    end_token: int
    k: int
    query: Region
    ids: Region
    scores: Region
    held: Region
    rows: Region
    histogram: Region = NOT_WANTED
    scales: Region = NOT_WANTED


class Request(NamedTuple):
    """See ``EvaluateRequest`` in cold_pool.proto; all regions are of one ``generation`` of the arena."""

    layer: int
    query_heads: int
    reduction: int
    generation: int
    items: list[Item]


class Evaluated(NamedTuple):
    """See ``EvaluationResult`` in cold_pool.proto."""

    generation: int
    missing_per_head: list[int]
    rows_brought: int
    evaluated_bytes: int
    read_bytes: int
    scan_s: float


class Answer(NamedTuple):
    """See ``EvaluateResponse`` in cold_pool.proto."""

    answered_at: float
    results: list[Evaluated]


def pack_request(request: Request) -> bytearray:
    """Return the bytes of ``request``; raises ``struct.error`` for numbers out of range."""
    header = request.layer, request.query_heads, len(request.items), request.reduction, request.generation
    packed = bytearray(_HEADER.pack(*header))
    for context_id, first, end, k, *regions in request.items:
        packed += _ITEM.pack(context_id, first, end, k, *(number for region in regions for number in region))
    return packed


def ask_again(packed: bytearray, layer: int, tokens: Iterable[Tokens]) -> bytes:
    """Return the bytes of a packed request for another ``layer`` and other (first, end) of each item."""
    _LAYER.pack_into(packed, 0, layer)
    at = _HEADER.size + _FIRST_TOKEN_AT
    for first, end in tokens:
        _TOKENS.pack_into(packed, at, first, end)
        at += _ITEM.size
    return bytes(packed)


def unpack_request(packed: bytes | memoryview) -> Request:
    """Return what ``packed`` says; raises :class:`InvalidInput` if it is not a request."""
    layer, query_heads, _, reduction, generation = _checked_header(packed)
    items = [
        Item(
            context_id, first, end, k,
            Region(n[0], n[1]), Region(n[2], n[3]), Region(n[4], n[5]), Region(n[6], n[7]),
            Region(n[8], n[9]), Region(n[10], n[11]), Region(n[12], n[13]),
        )
        for context_id, first, end, k, *n in _ITEM.iter_unpack(packed[_HEADER.size :])
    ]  # fmt: skip
    return Request(layer, query_heads, reduction, generation, items)


def with_tokens(items: Iterable[Item], tokens: Iterable[Tokens]) -> list[Item]:
    """Return ``items`` with other tokens."""
    # A quarter of what _replace takes.
    return [Item._make((item[0], *each, *item[3:])) for item, each in zip(items, tokens, strict=True)]


class Unpacker(Generic[T]):
    """Unpacks requests that are asked again and again, as :func:`ask_again` makes them.

    What ``make`` makes of one is kept for others that are the same in every byte but those of layer and
    tokens; ``make`` must not look at these. One thread at a time.
    """

    def __init__(self, make: Callable[[Request], T]) -> None:
        self._make = make
        self._kept: dict[bytes, T] = {}

    def unpack(self, packed: bytes) -> tuple[int, list[Tokens], T]:
        """Return layer, tokens of each item, and what was made of all else.

        Raises :class:`InvalidInput` if ``packed`` is not a request, and what ``make`` raises.
        """
        layer, *_ = _checked_header(packed)
        tokens, rest, at = [], [packed[_LAYER.size : _HEADER.size]], _HEADER.size
        while at < len(packed):
            tokens.append(_TOKENS.unpack_from(packed, at + _FIRST_TOKEN_AT))
            rest.append(packed[at : at + _FIRST_TOKEN_AT])
            rest.append(packed[at + _AFTER_TOKENS_AT : at + _ITEM.size])
            at += _ITEM.size
        key = b"".join(rest)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._make(unpack_request(packed))
            if len(self._kept) == _KEPT:
                self._kept.clear()
            self._kept[key] = kept
        return layer, tokens, kept


def _checked_header(packed: bytes | memoryview) -> tuple[int, int, int, int, int]:
    if len(packed) < _HEADER.size:
        raise InvalidInput(f"{len(packed)} bytes are not a packed evaluation")
    header: tuple[int, int, int, int, int] = _HEADER.unpack_from(packed)
    if len(packed) != _HEADER.size + header[2] * _ITEM.size:
        raise InvalidInput(f"{len(packed)} bytes are not a packed request of {header[2]} evaluations")
    return header


def pack_results(results: Iterable[Evaluated]) -> bytes:
    """Return the bytes of ``results``; those of several packed apart may be joined."""
    parts = []
    for generation, missing, brought, evaluated, read, scan_s in results:
        heads = len(missing)
        whole = f"{_RESULT.format}{heads}I"
        parts.append(struct.pack(whole, generation, brought, evaluated, read, scan_s, heads, *missing))
    return b"".join(parts)


def unpack_results(packed: bytes) -> list[Evaluated]:
    """Return what ``packed`` says; raises ``struct.error`` if it is cut short."""
    results, at = [], 0
    while at < len(packed):
        generation, brought, evaluated, read, scan_s, heads = _RESULT.unpack_from(packed, at)
        missing = struct.unpack_from(f"<{heads}I", packed, at + _RESULT.size)
        results.append(Evaluated(generation, list(missing), brought, evaluated, read, scan_s))
        at += _RESULT.size + heads * _COUNT_BYTES
    return results


def pack_answer(answered_at: float, results: bytes) -> bytes:
    """Return the bytes of an answer of packed ``results``."""
    return _ANSWERED.pack(answered_at) + results


def unpack_answer(packed: bytes) -> Answer:
    """Return what ``packed`` says; raises ``struct.error`` if it is cut short."""
    (answered_at,) = _ANSWERED.unpack_from(packed)
    return Answer(answered_at, unpack_results(packed[_ANSWERED.size :]))
