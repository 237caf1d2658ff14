"""The query that a layer makes of its input, in native code and in the thread that asks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import _native
from .errors import InvalidInput
from .kernel import variant
from .reference import F32


class QueryParts(NamedTuple):
    """What a layer with Llama's parts makes its query with; each float32 and C-contiguous.

    norm: factors [E] of the normalisation of the input, by the root of its mean square and ``epsilon``;
    weight: of the projection, [H * D, E]; bias: [H * D]; head_norm: factors [D] of a normalisation of each
    head.
    """

    norm: F32
    epsilon: float
    weight: F32
    bias: F32 | None = None
    head_norm: F32 | None = None
    head_epsilon: float = 0.0


def make_query(hidden: F32, parts: QueryParts, cosines: F32, sines: F32) -> F32:
    """Return the query float32 [B, H, n, D] of a layer's input ``hidden`` float32 [B, n, E].

    It is ``rotate(norm_of_heads(weight norm(hidden) + bias))``, where ``norm(x) = factors * x /
    sqrt(mean(x^2) + epsilon)`` (Zhang and Sennrich, 2019) and the rotation turns the halves of each head
    against each other (Su et al., 2021, as transformers has it) by ``cosines`` and ``sines`` float32
    [B or 1, n, D]. Sums are of floats, in an order of its own. D is a multiple of 4. Keeps the GIL, as it is
    meant for what takes microseconds; from any thread. Raises :class:`InvalidInput` for shapes that do not
    fit.
    """
    (batch, tokens, _), size = hidden.shape, cosines.shape[-1]
    out = np.empty((batch, len(parts.weight) // max(size, 1), tokens, size), np.float32)
    hidden, cosines, sines = (np.ascontiguousarray(each) for each in (hidden, cosines, sines))
    if not _native.make_query(variant(), hidden, *parts, cosines, sines, out):
        raise InvalidInput(
            f"cannot make a query of {list(hidden.shape)} by a weight {list(parts.weight.shape)} and a "
            f"rotation {list(cosines.shape)}"
        )
    return out


def is_near(query: F32, other: F32, most: float) -> bool:
    """Whether no head of ``query`` [..., D] is further from that of ``other`` than ``most`` of its length.

    Both float32. False for shapes that differ, and where either has numbers that are not finite.
    """
    if query.shape != other.shape:
        return False
    one, two = (np.ascontiguousarray(each).reshape(-1, each.shape[-1]) for each in (query, other))
    return _native.is_near(one, two, most)
