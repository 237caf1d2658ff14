"""The whole KV of a layer in every step, as FlexGen does."""

from __future__ import annotations

from collections.abc import Sequence

from hillinfer.bench.kvpath.rig import Rig
from hillinfer.bench.kvpath.systems.base import System, held_tokens
from hillinfer.bench.kvpath.systems.streaming import Stream
from hillinfer.session import EvaluateItem, Session


class Reload(System):
    """Nothing is ranked and nothing kept: rows pass through the arena, where attention would read them."""

    name = "reload"
    keys_in_memory = False
    held = 0
    """Tokens of each layer that need not be brought."""

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> None:
        """Bring all rows."""
        (item,) = items
        self.stream = self.stream or Stream(item.context, owned=False)
        for _ in self.stream.pieces(layer, item.context.flushed(layer), self.held):
            pass


class ReloadHeld(Reload):
    """The same with the first tokens' KV in the memory that it may have, in place of a hot pool."""

    name = "reload_held"
    hot_pool = False

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        shape = rig.workload.shape
        self._token_bytes = shape.kv_heads * 2 * shape.head_dim * 2
        self.held = held_tokens(rig, self._token_bytes)

    @property
    def resident_bytes(self) -> int:
        """The KV held."""
        return self.held * self._token_bytes * self.rig.workload.layers
