"""What worker and catalogue file exchange about the layers of durable contexts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hillinfer_core.reference import U32

from .placement import Placed
from .quantisation import Quantisation, SealedKeys


@dataclass
class LayerContent:
    """What a worker needs to go on with a layer: where it lies, and what vouches for it.

    ``row_checksums`` [kv_heads, tokens]; ``quantisation`` is None while there are no tokens.
    """

    tokens: int
    placed: list[Placed]
    quantisation: Quantisation | None
    sealed: list[SealedKeys]
    row_checksums: U32


@dataclass(frozen=True)
class Appended:
    """What an append changed, besides the rows: ``row_checksums`` [kv_heads, n] of the new tokens."""

    quantisation: Quantisation
    sealed: list[SealedKeys] = field(default_factory=list)
    row_checksums: U32 = field(default_factory=lambda: np.empty((0, 0), np.uint32))
