"""Durable contexts: named, owned by a user, kept until deleted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hillinfer_core.errors import ContextInUse, ContextMismatch, InvalidInput
from hillinfer_core.layout import Shape

from .extents import Extent
from .layers import Layer

MAX_NAME = 128
"""Characters of a name."""

MAX_LABELS, MAX_LABEL_KEY, MAX_LABEL_VALUE = 16, 64, 256
"""How many labels, and how many characters, as cold_pool.proto says."""

MAX_APPEND_ROWS = 32768
"""Rows of one append: their checksums travel with the worker's answer, in one packet."""

MAX_CHANNELS = 8192
"""KV heads times head dimension: a layer's quantisation ranges travel the same way."""


@dataclass
class Durable:
    """A durable context. ``record_id`` names it in the catalogue file, ``context_id`` in the worker.

    Written by one context at a time (``writer``, 0 for none) until it is saved. From then on nothing of it
    changes, and any number of volatile contexts (``readers``) begin with its tokens.

    ``unique`` tells it from every other there ever is; ``checksum`` is over the checksums of its rows and
    over its tails, as of when it was last loaded or saved. ``gid``: a group that may begin with it, None
    for none.
    """

    record_id: int
    name: str
    uid: int
    shape: Shape
    labels: dict[str, str]
    created_unix_s: int
    saved: bool = False
    layers: list[Layer] = field(default_factory=list)
    tails: list[int] = field(default_factory=list)
    writer: int = 0
    readers: set[int] = field(default_factory=set)
    context_id: int = 0
    loaded: bool = False
    unique: str = ""
    checksum: int = 0
    gid: int | None = None

    @property
    def extents(self) -> list[Extent]:
        """Every extent of every layer."""
        return [placed.extent for layer in self.layers for placed in layer.placed]

    @property
    def extent_bytes(self) -> int:
        """Bytes of the pool that it takes."""
        return sum(extent.length for extent in self.extents)

    @property
    def tail_bytes(self) -> int:
        """Bytes of rows that are kept aside in the catalogue."""
        return sum(self.tails) * self.shape.kv_heads * self.shape.row_bytes

    def check_matches(self, shape: Shape, labels: Mapping[str, str]) -> None:
        """Raise :class:`ContextMismatch` naming the first difference to what a caller expects."""
        for name in ("layers", "kv_heads", "head_dim", "dtype", "precision"):
            mine, theirs = getattr(self.shape, name), getattr(shape, name)
            if mine != theirs:
                raise self._mismatch(name, str(mine), str(theirs))
        for name in sorted(self.labels.keys() | labels.keys()):
            if self.labels.get(name) != labels.get(name):
                raise self._mismatch(name, self.labels.get(name, "none"), labels.get(name, "none"))

    def check_writable(self) -> None:
        """Raise :class:`ContextInUse` once it is saved."""
        if self.saved:
            raise ContextInUse(f"context {self.name!r} is saved, nobody can write it; begin with it")

    def check_free(self, wanted: str) -> None:
        """Raise :class:`ContextInUse` while any context is open on it."""
        if self.writer:
            raise ContextInUse(
                f"{wanted}: {self.name!r} is being written by another session; try again later"
            )
        if self.readers:
            raise ContextInUse(f"{wanted}: {len(self.readers)} contexts begin with {self.name!r}; close them")

    def _mismatch(self, what: str, mine: str, theirs: str) -> ContextMismatch:
        return ContextMismatch(
            f"context {self.name!r} differs in {what}: it has {mine}, not {theirs}; "
            f"choose another name, or `hillinferctl contexts delete {self.name}`"
        )


def check_name(name: str) -> None:
    """Raise :class:`InvalidInput` unless ``name`` can name a durable context."""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable() or name != name.strip():
        raise InvalidInput(
            f"{name!r} cannot name a context: give 1 to {MAX_NAME} printable characters, "
            "without spaces at either end"
        )


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise :class:`InvalidInput` for more or longer labels than allowed."""
    if len(labels) > MAX_LABELS:
        raise InvalidInput(f"{len(labels)} labels; at most {MAX_LABELS} are allowed")
    for key, value in labels.items():
        if not 1 <= len(key) <= MAX_LABEL_KEY or len(value) > MAX_LABEL_VALUE:
            raise InvalidInput(
                f"label {key[:MAX_LABEL_KEY]!r}: keys have 1 to {MAX_LABEL_KEY} characters, "
                f"values at most {MAX_LABEL_VALUE}"
            )


def check_shape(shape: Shape) -> None:
    """Raise :class:`InvalidInput` for a shape too large to be durable."""
    if shape.kv_heads * shape.append_unit > MAX_APPEND_ROWS or shape.kv_heads * shape.head_dim > MAX_CHANNELS:
        raise InvalidInput(
            f"{shape.kv_heads} KV heads of dimension {shape.head_dim} are too many for a durable context; "
            f"at most {MAX_CHANNELS} channels and {MAX_APPEND_ROWS} rows in an append unit"
        )


def append_limit(shape: Shape) -> int:
    """Return the tokens that one append to a durable context takes at most: whole append units."""
    return MAX_APPEND_ROWS // shape.kv_heads // shape.append_unit * shape.append_unit
