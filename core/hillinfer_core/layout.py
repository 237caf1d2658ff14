"""How rows and evaluation keys lie in memory and in the cold pool (version: ``protocol.LAYOUT_VERSION``).

A *row* is one token of one KV head: its key, then its value, each ``head_dim`` numbers of the model's dtype.

*Evaluation keys* are, for each KV head, tiles of 16 tokens made of 64-byte beats; 4 bytes of a beat belong to
each token. INT8: beat j holds dims 4j..4j+3, byte ``4*t+i`` is ``k'[t, 4j+i]``. INT4: beat j holds dims
8j..8j+7, byte ``4*t+i`` has ``k'[t, 8j+i]`` in its low and ``k'[t, 8j+4+i]`` in its high nibble.
The reasons are in docs/decisions/001-evaluation-arithmetic-and-layout.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from functools import cached_property
from math import gcd, lcm
from typing import TypeVar

import numpy as np

from .errors import InvalidInput

_Member = TypeVar("_Member", bound=Enum)

PAGE = 4096
"""Bytes of a page: the unit of direct I/O and of append."""

TILE_TOKENS = 16
"""Tokens of a tile: the 32-bit lanes of a 512-bit word."""

MAX_HEAD_DIM = 256
"""Largest head dimension: keeps every INT32 score far from overflow (256 * 127 * 255 < 2**23)."""


class DType(StrEnum):
    """Number format of rows."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"

    @cached_property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return self.storage.itemsize

    @cached_property
    def storage(self) -> np.dtype[np.generic]:
        """The numpy dtype that rows are held in; bfloat16 is held as its raw bits in uint16."""
        return np.dtype("uint16" if self is DType.bfloat16 else self.value)

    def to_proto(self) -> int:
        """Return the number of ``hillinfer.v1.DType``."""
        return list(DType).index(self) + 1

    @classmethod
    def from_proto(cls, number: int) -> DType:
        """Return the member for a ``hillinfer.v1.DType``, or raise :class:`InvalidInput`."""
        return _member(list(cls), number, "dtype")


class Precision(StrEnum):
    """Number format of evaluation keys."""

    int8 = "int8"
    int4 = "int4"

    @property
    def bits(self) -> int:
        """Bits of one evaluation-key element."""
        return 8 if self is Precision.int8 else 4

    @property
    def levels(self) -> int:
        """Largest evaluation-key element: 255 or 15."""
        return (1 << self.bits) - 1

    def to_proto(self) -> int:
        """Return the number of ``hillinfer.v1.Precision``."""
        return list(Precision).index(self) + 1

    @classmethod
    def from_proto(cls, number: int) -> Precision:
        """Return the member for a ``hillinfer.v1.Precision``, or raise :class:`InvalidInput`."""
        return _member(list(cls), number, "precision")


class Reduction(StrEnum):
    """How the scores of the query heads that share a KV head become one score; with ``none`` they do not."""

    sum = "sum"
    max = "max"
    none = "none"

    def to_proto(self) -> int:
        """Return the number of ``hillinfer.v1.Reduction``."""
        return list(Reduction).index(self) + 1

    @classmethod
    def from_proto(cls, number: int) -> Reduction:
        """Return the member for a ``hillinfer.v1.Reduction``, or raise :class:`InvalidInput`."""
        return _member(list(cls), number, "reduction")


def _member(members: list[_Member], number: int, what: str) -> _Member:
    if not 1 <= number <= len(members):
        names = ", ".join(str(member.value) for member in members)
        raise InvalidInput(f"{what} {number} is not known; use one of {names}")
    return members[number - 1]


@dataclass(frozen=True)
class Shape:
    """The shape of a context: what every layer of it stores."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: DType
    precision: Precision = Precision.int4

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row: key and value of one token and KV head."""
        return 2 * self.head_dim * self.dtype.itemsize

    @cached_property
    def append_unit(self) -> int:
        """Tokens that every append is a multiple of: whole tiles, and whole pages for each head."""
        return lcm(TILE_TOKENS, PAGE // gcd(PAGE, self.row_bytes))

    @cached_property
    def key_tile_bytes(self) -> int:
        """Bytes of a tile of evaluation keys: 16 tokens of one KV head."""
        return tile_bytes(self.head_dim, self.precision)

    def validate(self) -> None:
        """Raise :class:`InvalidInput` unless every field is in its range."""
        if not 1 <= self.layers <= 4096:
            raise InvalidInput(f"layers must be 1 to 4096, not {self.layers}")
        if not 1 <= self.kv_heads <= 1024:
            raise InvalidInput(f"kv_heads must be 1 to 1024, not {self.kv_heads}")
        if not 8 <= self.head_dim <= MAX_HEAD_DIM or self.head_dim % 8:
            raise InvalidInput(
                f"head_dim must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, not {self.head_dim}"
            )


def tile_bytes(head_dim: int, precision: Precision) -> int:
    """Return the bytes of a tile of evaluation keys: 16 tokens of one KV head."""
    return TILE_TOKENS * head_dim * precision.bits // 8
