"""How the evaluation keys of a layer were made."""

from __future__ import annotations

from dataclasses import dataclass

from hillinfer_core.reference import Ranges


@dataclass(frozen=True)
class Quantisation:
    """The ranges that a layer's evaluation keys were made with, and what says whether they still fit.

    ``fitted_tokens`` had their keys looked at to fit the ranges; of the key elements of ``later_tokens``,
    quantised since, ``clipped`` lay outside them. ``generation`` counts how often the layer was quantised
    again.
    """

    ranges: Ranges
    fitted_tokens: int
    later_tokens: int = 0
    clipped: int = 0
    generation: int = 0


@dataclass(frozen=True)
class SealedKeys:
    """Evaluation keys of ``tokens`` tokens from ``first_token`` on, written to their extent once and for all.

    ``checksums`` holds the data checksum of each KV head.
    """

    first_token: int
    tokens: int
    checksums: tuple[int, ...]
