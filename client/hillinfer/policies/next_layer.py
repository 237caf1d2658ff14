"""A query predicted from the layer before, keys ranked on the host, after InfiniGen (Lee et al., 2024)."""

from __future__ import annotations

from typing import Any

from hillinfer.pipeline.query import cache_of, decoder_layers, hidden_of, is_taking, layer_query, predictable
from hillinfer.policies.base import F32, HostPolicy, Ids, Reading, best, group_sum
from hillinfer.session import EvaluateItem


class NextLayerQuery:
    """Predicts a layer's query: the input of the layer before through its own norm, projection and RoPE.

    Hooks into the model, which must be attached, until `close`. The first layer has
    its own query. Raises UnsupportedModel as `decoder_layers` does.
    """

    def __init__(self, model: Any) -> None:
        self.predicted: dict[int, F32] = {}
        """float32 [heads, head_dim] of the step in progress, by layer of the cold pool."""
        self._layers = decoder_layers(model)
        known = predictable(model, self._layers)
        self._hooks = [
            layer.register_forward_pre_hook(self._hook(index + 1), with_kwargs=True)
            for index, layer in enumerate(self._layers[:-1])
            if known[index + 1]
        ]

    def ranking_query(self, layer: int, exact: F32) -> F32:
        """See `QueryPredictor.ranking_query`."""
        predicted = self.predicted.get(layer)
        return exact if predicted is None else predicted[None]

    def close(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, index: int) -> Any:
        def predict(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if is_taking():
                return
            cache = cache_of(args, kwargs)
            target = None if cache is None else getattr(cache.layers[index], "index", None)
            if target is None:
                return
            self.predicted.pop(target, None)
            if hidden_of(args, kwargs).shape[:2] == (1, 1):
                query = layer_query(self._layers[index], args, kwargs)
                self.predicted[target] = query[0, :, 0].float().cpu().numpy()

        return predict


class NextLayer(HostPolicy):
    """Ranks float32 keys on the host with a predicted query.

    Simplified: InfiniGen scores part of the channels, chosen by a decomposition
    of the weights, and lets the number of tokens vary; here all channels count.
    """

    name = "next_layer"

    def __init__(self, model: Any, reading: Reading) -> None:
        super().__init__(model, reading)
        self._predictor = NextLayerQuery(model)

    @property
    def predictor(self) -> NextLayerQuery:
        """The predicted query."""
        return self._predictor

    def choose(self, layer: int, item: EvaluateItem, keys: F32) -> Ids:
        """By the sum of products over the group, as HillInfer ranks."""
        return best(group_sum(item.query, keys), item)

    def close(self) -> None:
        """Take the hooks out of the model."""
        self._predictor.close()
