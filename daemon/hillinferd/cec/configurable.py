"""What a card must offer so that CEC can configure it; no part of the driver contract."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from uuid import UUID

import numpy as np
import numpy.typing as npt

from hillinfer_core.layout import Precision
from hillinfer_core.reference import I32, U8, U32


@dataclass(frozen=True)
class Vector:
    """One run of the kernel: tokens ``begin .. end - 1`` of ``tiles`` uint8 [H, T, tile bytes].

    ``q`` is int8 or int16 [H, R, D], with ``offsets`` int32 [H, R]; ``first_id`` is the id of the first token
    of the tiles.
    """

    precision: Precision
    tiles: U8
    q: npt.NDArray[Any]
    offsets: I32
    begin: int
    end: int
    k: int
    first_id: int


@dataclass(frozen=True)
class Outcome:
    """What a run gives: ids and scores [H, min(k, n)], histogram [H, 2048], data checksums [H]."""

    ids: U32
    scores: I32
    histogram: U32
    checksums: U32

    def same(self, other: Outcome) -> bool:
        """Whether both agree to the bit."""
        return all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("ids", "scores", "histogram", "checksums")
        )


@runtime_checkable
class Configurable(Protocol):
    """A card. Calls block, one at a time; a card that does not answer raises ``DeviceUnavailable``."""

    def interface_uuids(self) -> list[UUID]:
        """Return the shells that a bitstream for this card may be built for."""
        ...

    def loaded_uuid(self) -> UUID | None:
        """Return the uuid that the card reports of its bitstream, or None."""
        ...

    def configure(self, path: Path) -> None:
        """Load the xclbin at ``path``, unless it is loaded; evaluation keys on the card are forgotten.

        Raises ``BadBitstream`` if it is not for this card, or the card reports another uuid afterwards.
        """
        ...

    def release(self) -> None:
        """Use the loaded bitstream no more: scans are refused until :meth:`configure`."""
        ...

    def run_vector(self, kernel: str, vector: Vector) -> Outcome:
        """Run ``kernel`` of the loaded bitstream on ``vector``."""
        ...
