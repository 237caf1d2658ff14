"""What the systems share: the drive, and HKM's own slots and hot pool."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from hillinfer.bench.kvpath.rig import ARENA_BYTES, Rig
from hillinfer.bench.kvpath.systems.streaming import Stream
from hillinfer.session import Brought, EvaluateItem, Session

Ids = npt.NDArray[np.uint32]


class System(ABC):
    """A way from a query to staged KV; a `SelectionPolicy` for one sequence.

    Made after the rig is filled; what it stores besides goes to the drive or to
    `resident_bytes` then.
    """

    name: ClassVar[str]
    hot_pool: ClassVar[bool] = True
    """Whether it keeps a hot pool; without one, its slots alone remember the last selection."""
    keys_in_memory: ClassVar[bool] = True
    """Whether evaluation keys stay in fast memory, of its share; who has no use for them there has more
    room for rows."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.stream: Stream | None = None

    @property
    def resident_bytes(self) -> int:
        """Bytes that it holds in memory besides what HKM counts."""
        return 0

    @abstractmethod
    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        """See `SelectionPolicy.select`."""

    def close(self) -> None:
        """Let go of threads and contexts."""
        if self.stream is not None:
            self.stream.close()


def held_tokens(rig: Rig, token_bytes: int) -> int:
    """Return the tokens of which each layer can hold `token_bytes` in what slots leave of `resident`."""
    shape = rig.workload.shape
    attended = 0 if rig.attends is None else rig.attends.of(rig.workload.tokens)
    slots = attended * shape.kv_heads * 2 * shape.head_dim * 2 * rig.workload.layers
    room = max(0, rig.resident - ARENA_BYTES - slots)
    return min(rig.workload.tokens, room // rig.workload.layers // token_bytes)


class HostSystem(System):
    """Ranks on the host. A subclass says which tokens; rows that are not held are fetched."""

    keys_in_memory = False

    @abstractmethod
    def choose(self, layer: int, item: EvaluateItem) -> Ids:
        """Return uint32 [kv_heads, item.k], ascending, of item.first .. item.end-1. Blocks."""

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought]:
        """Choose, then fetch."""
        return [self._select(layer, item) for item in items]

    def _select(self, layer: int, item: EvaluateItem) -> Brought:
        ids = self.choose(layer, item)
        has = np.zeros((len(ids), item.end), np.bool_)
        for head, held in enumerate(item.held):
            has[head, held[held < item.end]] = True
        missing = [wanted[~has[head, wanted]] for head, wanted in enumerate(ids)]
        rows = item.context.fetch_rows(layer, missing)
        return Brought(ids, [len(each) for each in missing], rows, 0, 0, 0)
