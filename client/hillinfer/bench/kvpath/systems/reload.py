"""The whole KV of a layer in every step, as FlexGen does."""

from __future__ import annotations

from collections.abc import Sequence

from hillinfer.bench.kvpath.systems.base import System
from hillinfer.bench.kvpath.systems.streaming import Stream
from hillinfer.session import EvaluateItem, Session


class Reload(System):
    """Nothing is ranked and nothing kept: rows pass through the arena, where attention would read them."""

    name = "reload"
    keys_in_memory = False

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> None:
        """Bring all rows."""
        (item,) = items
        self.stream = self.stream or Stream(item.context, owned=False)
        for _ in self.stream.pieces(layer, item.context.flushed(layer)):
            pass
