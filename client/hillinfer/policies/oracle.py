"""The best that a choice of this many tokens can do."""

from __future__ import annotations

from hillinfer.policies.base import F32, HostPolicy, Ids, attention_mass, best
from hillinfer.session import EvaluateItem


class Oracle(HostPolicy):
    """Exact top-k: float32 keys, the layer's own query, ranked by attention mass.

    The mass of a token is summed over the query heads that share its KV head, so no
    other choice of as many tokens captures more of it.
    """

    name = "oracle"

    def choose(self, layer: int, item: EvaluateItem, keys: F32) -> Ids:
        """By each token's share of the attention."""
        reading = self.reading
        mass = attention_mass(item.query, keys, reading.scaling[layer], reading.softcap[layer])
        return best(mass.sum(axis=1), item)
