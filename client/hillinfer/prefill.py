"""How a text is read: so many tokens to a forward pass."""

from __future__ import annotations

from collections.abc import Iterator

PREFILL_CHUNK = 4096
"""Tokens of a forward pass. Bounds activations and moves the progress bar; each chunk reads all before it
from the cold pool again, so half as long a chunk costs twice as many bytes."""


def chunks(tokens: int, most: int = PREFILL_CHUNK) -> Iterator[slice]:
    """Yield the parts of a text of `tokens` tokens in order, none of one token unless it is the whole text.

    A step of a single token selects what it attends to; reading is exact. So a part
    may be one longer than `most`, which is at least 2.
    """
    first = 0
    while first < tokens:
        end = tokens if tokens - first <= most + 1 else first + most
        yield slice(first, end)
        first = end
