"""What the daemon knows of one layer of a context."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .placement import Placed


@dataclass
class Layer:
    """One layer's tokens and the extents that hold them, ascending by token.

    The first ``shared`` of them belong to the durable context that this one began with.
    """

    tokens: int = 0
    placed: list[Placed] = field(default_factory=list)
    shared: int = 0

    @property
    def covered(self) -> int:
        """Tokens that fit in the extents the layer already has."""
        return self.placed[-1].end_token if self.placed else 0

    @property
    def own(self) -> list[Placed]:
        """The extents that are the layer's own."""
        return self.placed[self.shared :]

    def continued(self) -> Layer:
        """Return a layer that begins with these tokens and puts whatever follows into extents of its own."""
        placed = [item for item in self.placed if item.first_token < self.tokens]
        if placed:
            last = placed[-1]
            placed[-1] = replace(last, tokens=min(last.tokens, self.tokens - last.first_token))
        return Layer(self.tokens, placed, len(placed))
