"""Keys and queries recorded from the bundled model, to rank with in a model whose weights are random.

Random weights attend to nothing in particular: nearly all that a step selects misses what the step before
held. What is recorded repeats and moves as a model's selections do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hillinfer.bench.kvpath.recording import Recording
from hillinfer.bench.kvpath.workload import LayerShape, make_workload
from hillinfer.hkm.policy import ColdPoolRanking
from hillinfer.kv_shape import KvShape
from hillinfer.session import EvaluateItem
from hillinfer_core.errors import InvalidInput

_APART = 7  # steps between layers that share recorded keys, so that they do not ask the same at once


class Replay(ColdPoolRanking):
    """The daemon ranks recorded keys by recorded queries, whatever the model asks.

    The recorded KV heads are dealt to layers as in `hillinfer bench kvpath`; further layers have
    the same keys, and queries of other steps. When the steps are at their end they begin anew. Predicted
    queries are replaced too: what a prediction loses is not in it.
    """

    def __init__(self, recording: Recording, kv: KvShape, heads: int, tokens: int) -> None:
        """For a context of `tokens` tokens. Raises InvalidInput for a recording that does not fit."""
        recorded = recording.keys.shape[2]
        if recorded != tokens:
            raise InvalidInput(f"the recording has {recorded} tokens, not {tokens}: name another file")
        shape = LayerShape(kv.kv_heads, heads, kv.head_dim, kv.layers)
        self._workload = make_workload(recording, shape, seed=0)
        self._first: dict[int, int] = {}
        """By context, up to where its first step ranked."""

    def keys(self, layer: int) -> torch.Tensor:
        """Return float16 [kv_heads, tokens, head_dim], to fill the layer's cache with."""
        return torch.from_numpy(self._workload.keys[layer % self._workload.layers])

    def asked(self, layer: int, items: Sequence[EvaluateItem]) -> list[EvaluateItem]:
        """Return `items` with the recorded queries."""
        again, of = divmod(layer, self._workload.layers)
        queries = self._workload.queries[:, of]
        # Each step ranks one token more.
        steps = [each.end - self._first.setdefault(each.context.context_id, each.end) for each in items]
        return [
            each._replace(query=queries[(step + again * _APART) % len(queries)])
            for step, each in zip(steps, items, strict=True)
        ]
