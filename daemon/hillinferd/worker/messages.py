"""Messages between daemon and device worker, one reply to each (:mod:`.packets`).

The daemon has checked regions, ids of contexts and numbers of tokens; the worker checks what only the arena's
bytes tell.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from hillinfer_core.layout import Reduction, Shape
from hillinfer_core.packed import Item

from ..cec.loader import Status
from ..domain.content import Appended
from ..domain.extents import Extent
from ..domain.placement import Placed
from ..domain.quantisation import SealedKeys
from ..domain.regions import Region
from ..driver.contract import Identity

MAX_EXTENTS = 1000
"""Extents in one :class:`Discard`: about 40 KB."""


@dataclass(frozen=True)
class AttachArena:
    """Map a session's arena of ``nbytes``; its descriptor comes with the packet."""

    session_id: int
    nbytes: int


@dataclass(frozen=True)
class DetachArena:
    """Unmap a session's arena."""

    session_id: int


@dataclass(frozen=True)
class OpenContext:
    """Begin a context: with no tokens, or with those of the saved context ``base``, which is loaded."""

    context_id: int
    shape: Shape
    base: int = 0


@dataclass(frozen=True)
class LoadContext:
    """Load a durable context; its layers come along as a file with a pickled list of ``LayerContent``."""

    context_id: int
    shape: Shape


@dataclass(frozen=True)
class SealContext:
    """Write the evaluation keys that are not in the pool yet; the answer is in ``Done.sealed``."""

    context_id: int


@dataclass(frozen=True)
class DropContext:
    """Forget a context, if it is known."""

    context_id: int


@dataclass(frozen=True)
class Health:
    """See whether the drive answers."""


@dataclass(frozen=True)
class Discard:
    """Discard extents, at most :data:`MAX_EXTENTS`, that no layer uses (any more)."""

    extents: list[Extent]


@dataclass(frozen=True)
class Append:
    """Append ``tokens`` from ``rows`` [kv_heads][tokens][2][head_dim]; ``placed`` are new extents.

    With ``durable`` the answer comes when all is safe from a loss of power, and says in ``Done.appended``
    what to record.
    """

    session_id: int
    context_id: int
    layer: int
    first_token: int
    tokens: int
    rows: Region
    placed: list[Placed]
    durable: bool = False


class Evaluate(NamedTuple):
    """Rank tokens of one layer for several contexts of one session.

    ``packed`` is the same by :mod:`hillinfer_core.packed`, if it came so.
    """

    session_id: int
    layer: int
    query_heads: int
    reduction: Reduction
    evaluations: list[Item]
    packed: bytes = b""


@dataclass(frozen=True)
class FetchIds:
    """Bring rows by id: ``ids`` holds ``sum(count_per_head)`` uint32, head by head."""

    session_id: int
    context_id: int
    layer: int
    count_per_head: list[int]
    ids: Region
    rows: Region


@dataclass(frozen=True)
class FetchRange:
    """Bring a run of tokens of every head.

    ``rows`` has room for as many tokens of each head as ``room`` says; the run goes after the first
    ``skipped`` of them.
    """

    session_id: int
    context_id: int
    layer: int
    first_token: int
    count: int
    rows: Region
    room: int
    skipped: int = 0


@dataclass(frozen=True)
class FetchKeys:
    """Bring evaluation keys of whole tiles, and the ranges' scale; the answer is in ``Done.keys``."""

    session_id: int
    context_id: int
    layer: int
    first_token: int
    end_token: int
    tiles: Region
    scales: Region


@dataclass(frozen=True)
class CecStatus:
    """Ask what bitstream the card has; the answer to this and the next two is in ``Done.bitstreams``."""


@dataclass(frozen=True)
class CecLoad:
    """Load the catalogue's bitstream ``name``; refused if the drive has open ``contexts``."""

    name: str
    contexts: int


@dataclass(frozen=True)
class CecRollback:
    """Go back to the bitstream that was good before; refused if the drive has open ``contexts``."""

    contexts: int


CecRequest: TypeAlias = CecStatus | CecLoad | CecRollback

Request: TypeAlias = (
    AttachArena
    | DetachArena
    | OpenContext
    | LoadContext
    | SealContext
    | DropContext
    | Health
    | Discard
    | Append
    | Evaluate
    | FetchIds
    | FetchRange
    | FetchKeys
    | CecRequest
)


@dataclass(slots=True)
class Traffic:
    """Bytes written to and read from the drive, and bytes of evaluation keys scanned.

    Of those, ``streamed`` had to be read from the drive; ``read`` counts them too. ``reads`` and ``writes``
    are requests, as :class:`~hillinferd.driver.contract.Requests` counts them.
    """

    written: int = 0
    read: int = 0
    evaluated: int = 0
    streamed: int = 0
    reads: int = 0
    writes: int = 0

    def add(self, other: Traffic) -> None:
        """Add ``other`` to this."""
        self.written += other.written
        self.read += other.read
        self.evaluated += other.evaluated
        self.streamed += other.streamed
        self.reads += other.reads
        self.writes += other.writes


@dataclass(frozen=True)
class BroughtKeys:
    """The result of :class:`FetchKeys`; ``checksums`` is the data checksum of each KV head."""

    generation: int
    checksums: list[int]


@dataclass(frozen=True)
class Ready:
    """The worker's first packet: its drive is open."""

    identity: Identity


@dataclass(slots=True)
class Done:
    """A request was carried out.

    ``evaluated`` answers :class:`Evaluate`, by :func:`hillinfer_core.packed.pack_results`, with how many
    ``winners`` all KV heads have and how many of them are ``missing``. ``appended`` answers a durable
    :class:`Append`, ``sealed`` :class:`SealContext` (by layer), ``bitstreams`` a :data:`CecRequest`, ``keys``
    :class:`FetchKeys`.
    ``key_bytes`` of evaluation keys are in fast memory now, ``context_key_bytes`` of them of the context that
    was opened, loaded or appended to.
    """

    traffic: Traffic = field(default_factory=Traffic)
    evaluated: bytes = b""
    winners: int = 0
    missing: int = 0
    appended: Appended | None = None
    sealed: list[tuple[int, SealedKeys]] = field(default_factory=list)
    key_bytes: int = 0
    context_key_bytes: int = 0
    bitstreams: Status | None = None
    keys: BroughtKeys | None = None


@dataclass(frozen=True)
class Failed:
    """A request failed with the error class ``error`` of hillinfer_core.errors; nothing was changed."""

    error: str
    message: str
    traffic: Traffic = field(default_factory=Traffic)


Reply: TypeAlias = Ready | Done | Failed
