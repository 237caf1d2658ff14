"""Work as a transport hands it in: plain values, regions not yet checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from hillinfer_core.layout import Reduction, Shape
from hillinfer_core.packed import Item, Tokens


class RawRegion(NamedTuple):
    """A byte range of the caller's arena, as the caller named it."""

    offset: int = 0
    length: int = 0
    generation: int = 0


@dataclass(frozen=True)
class OpenContext:
    """See ``OpenContextRequest`` in cold_pool.proto; at most one of the names is not empty."""

    shape: Shape
    durable_name: str = ""
    base_name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    base_uid: int | None = None


@dataclass(frozen=True)
class Append:
    """See ``AppendRequest`` in cold_pool.proto."""

    context_id: int
    layer: int
    first_token: int
    tokens: int
    rows: RawRegion
    tail: bool = False


@dataclass(frozen=True)
class Appended:
    """See ``AppendResponse`` in cold_pool.proto."""

    layer_tokens: int
    evaluation_key_bytes: int
    checksum_bytes: int


class Evaluation(NamedTuple):
    """See ``Evaluation`` in cold_pool.proto; without its tokens."""

    context_id: int
    k: int
    query: RawRegion
    ids: RawRegion
    scores: RawRegion
    held: RawRegion
    rows: RawRegion
    histogram: RawRegion
    scales: RawRegion


@dataclass(slots=True, eq=False)
class Terms:
    """What of a session's ``EvaluateRequest`` stays when it is asked again of another layer and other tokens.

    ``admitted`` is what :mod:`.admission` found when it last looked, ``term`` that of the last permit
    (:mod:`.express`).
    """

    query_heads: int
    reduction: Reduction
    evaluations: list[Evaluation]
    admitted: Admitted | None = None
    term: int = 0


class Admitted(NamedTuple):
    """Evaluations of :class:`Terms`, checked against a session's arena and the ``shapes`` of their contexts.

    Their tokens are 0 and 0.
    """

    shapes: list[Shape]
    items: list[Item]


class Evaluate(NamedTuple):
    """See ``EvaluateRequest`` in cold_pool.proto; ``tokens`` are first and end of each evaluation."""

    layer: int
    tokens: list[Tokens]
    terms: Terms
    packed: bytes = b""
    """The same by :mod:`hillinfer_core.packed`, if it came so."""


@dataclass(frozen=True)
class FetchIds:
    """See ``FetchRequest.by_ids`` in cold_pool.proto."""

    context_id: int
    layer: int
    count_per_head: list[int]
    ids: RawRegion
    rows: RawRegion


@dataclass(frozen=True)
class FetchRange:
    """See ``FetchRequest.range`` in cold_pool.proto."""

    context_id: int
    layer: int
    first_token: int
    count: int
    rows: RawRegion


@dataclass(frozen=True)
class FetchKeys:
    """See ``FetchRequest.keys`` in cold_pool.proto."""

    context_id: int
    layer: int
    first_token: int
    end_token: int
    tiles: RawRegion
    scales: RawRegion


@dataclass(frozen=True)
class FetchTail:
    """See ``FetchRequest.tail`` in cold_pool.proto."""

    context_id: int
    layer: int
    rows: RawRegion
