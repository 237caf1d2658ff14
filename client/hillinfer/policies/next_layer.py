"""A query predicted from the layer before, keys ranked on the host, after InfiniGen (Lee et al., 2024)."""

from __future__ import annotations

from typing import Any

import torch

from hillinfer.policies.base import F32, HostPolicy, Ids, Reading, best, group_sum
from hillinfer.session import EvaluateItem
from hillinfer_core.errors import UnsupportedModel


class NextLayerQuery:
    """Predicts a layer's query: the input of the layer before through its own norm, projection and RoPE.

    Hooks into the model until `close`. The first layer has its own query. Raises
    UnsupportedModel for models that are not laid out like Llama.
    """

    def __init__(self, model: Any) -> None:
        self.predicted: dict[int, F32] = {}
        """float32 [heads, head_dim] of the step in progress, by layer."""
        layers = getattr(model.get_decoder(), "layers", None)
        if layers is None or not all(
            hasattr(each, "input_layernorm") and hasattr(getattr(each, "self_attn", None), "q_proj")
            for each in layers
        ):
            raise UnsupportedModel(
                f"{type(model).__name__} has no layers with input_layernorm and self_attn.q_proj: "
                "leave out next_layer"
            )
        self._layers = layers
        self._hooks = [
            layer.register_forward_pre_hook(self._hook(index + 1), with_kwargs=True)
            for index, layer in enumerate(layers[:-1])
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
            hidden = args[0] if args else kwargs["hidden_states"]
            self.predicted.pop(index, None)
            if hidden.shape[:2] == (1, 1):
                self.predicted[index] = self._predict(index, hidden, *kwargs["position_embeddings"])

        return predict

    def _predict(self, index: int, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> F32:
        layer = self._layers[index]
        attention = layer.self_attn
        query = attention.q_proj(layer.input_layernorm(hidden)).view(-1, attention.head_dim)
        if hasattr(attention, "q_norm"):
            query = attention.q_norm(query)
        query, cos, sin = query.float(), cos[0, 0].float(), sin[0, 0].float()
        # RoPE in halves, as in Llama (Su et al., 2021).
        first, second = query.chunk(2, dim=-1)
        rotated = query * cos + torch.cat((-second, first), dim=-1) * sin
        result: F32 = rotated.cpu().numpy()
        return result


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
