"""The kernel configurations that ship: one for each top function of the HLS kernel, and what each can do."""

from __future__ import annotations

from dataclasses import dataclass

from hillinfer_core.layout import MAX_HEAD_DIM, TILE_TOKENS, Precision

BEAT_BYTES = 64
"""Bytes of a beat: one 512-bit word of the memory bus, all that the kernel takes in a clock cycle."""


@dataclass(frozen=True)
class Configuration:
    """A kernel as it is built.

    ``lanes`` is key elements multiplied in a cycle; ``heads_in_flight`` is heads whose scores are on chip at
    once: one is scanned while the winners of the other are chosen; ``max_tokens`` is tokens of a head in one
    run; ``max_vectors`` is query vectors of a head, taken one after the other.
    """

    name: str
    precision: Precision
    query_bits: int
    lanes: int
    heads_in_flight: int
    max_tokens: int
    max_head_dim: int
    max_vectors: int


def beat_lanes(precision: Precision) -> int:
    """Return the key elements of one beat: 64 for INT8, 128 for INT4."""
    return BEAT_BYTES * 8 // precision.bits


def _configuration(name: str, precision: Precision, query_bits: int) -> Configuration:
    # Limits as hls/evaluate.hpp has them.
    return Configuration(
        name=name,
        precision=precision,
        query_bits=query_bits,
        lanes=beat_lanes(precision),
        heads_in_flight=2,
        max_tokens=131_072,
        max_head_dim=MAX_HEAD_DIM,
        max_vectors=8,
    )


SHIPPED = (
    _configuration("evaluate_int8", Precision.int8, 8),
    _configuration("evaluate_int4", Precision.int4, 8),
    _configuration("evaluate_int8_q16", Precision.int8, 16),
)


def shipped_for(precision: Precision, query_bits: int) -> Configuration | None:
    """Return the shipped configuration for these number formats, or None."""
    found = (c for c in SHIPPED if (c.precision, c.query_bits) == (precision, query_bits))
    return next(found, None)


def beats_of_tile(head_dim: int, precision: Precision) -> int:
    """Return the beats of a tile of 16 tokens; ``head_dim`` is a multiple of 8."""
    return TILE_TOKENS * head_dim // beat_lanes(precision)
