"""Which models HKM can serve, told from configuration and modules before the first token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from hillinfer.hkm.tensors import row_dtype
from hillinfer_core.errors import UnsupportedModel
from hillinfer_core.layout import MAX_HEAD_DIM

# By model_type: what they do between the cache and the attention interface, which HKM replaces.
_OWN_WAYS = {
    "diffllama": "it attends twice to the same keys and takes the difference",
    "doge": "it computes a mask of its own from all values",
    "jetmoe": "it repeats the keys of the cache for its experts",
}

_RECURRENT = "it has layers with a recurrent state (state space, linear attention or convolution)"


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel, naming model and reason, for what HKM cannot serve.

    Looks at configuration and modules only, never at weights: cheap for a model of any size.
    """
    for reason in _reasons(model):
        raise UnsupportedModel(f"{type(model).__name__} is not supported: {reason}")


def kept_layers(config: PretrainedConfig) -> list[CacheLayerMixin]:
    """Return the model's cache layers in transformers: DynamicLayer for the cold pool, or sliding windows.

    Raises UnsupportedModel when there are others, or only sliding windows.
    """
    try:
        layers = DynamicCache(config=config).layers
    except Exception as error:  # configurations outside the common form raise whatever they happen to
        raise UnsupportedModel(f"transformers makes no plain cache for it ({error})") from error
    kept = []
    for layer in layers:
        if not isinstance(layer, CacheLayerMixin) or type(layer) not in (
            DynamicLayer,
            DynamicSlidingWindowLayer,
        ):
            raise UnsupportedModel(_layer_reason(layer))
        kept.append(layer)
    if not any(type(layer) is DynamicLayer for layer in kept):
        raise UnsupportedModel(
            "all its layers have a sliding window: there is nothing to keep in the cold pool"
        )
    return kept


def _layer_reason(layer: object) -> str:
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return _RECURRENT
    if isinstance(layer, DummyLayer):
        return "it has layers without attention, or that share the KV of others"
    if isinstance(layer, DynamicIndexedLayer):
        return "it has an index of its own that selects tokens"
    return f"it keeps KV in a way of its own ({type(layer).__name__})"


def _reasons(model: PreTrainedModel) -> Iterator[str]:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        yield "it is an encoder-decoder model"
    text = config.get_text_config(decoder=True)
    if getattr(text, "add_cross_attention", False) or getattr(text, "cross_attention_layers", None):
        yield "it has cross-attention"
    if getattr(text, "kv_lora_rank", None) is not None:
        yield "it uses multi-head latent attention (MLA), whose keys and values are not alike"
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", False):
        yield "its attention is not causal"
    if text.model_type in _OWN_WAYS:
        yield _OWN_WAYS[text.model_type]
    try:
        layers = kept_layers(text)
    except UnsupportedModel as error:
        yield str(error)
        return
    if getattr(model, "_is_stateful", False):
        yield _RECURRENT
    if not getattr(model, "_supports_attention_backend", False):
        yield "it does not use the attention interface of transformers (ALiBi models are among these)"
    row_dtype(model.dtype)
    full = {number for number, layer in enumerate(layers) if type(layer) is DynamicLayer}
    yield from _module_reasons(model, full)


def _module_reasons(model: PreTrainedModel, full: set[int]) -> Iterator[str]:
    """Look at the attention modules; `full` are the numbers of the layers for the cold pool."""
    widths = set()
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        if number is None:
            continue
        if getattr(module, "is_causal", True) is False:
            yield "its attention is not causal (a decoder needs is_decoder=True in its configuration)"
        if isinstance(getattr(module, "sinks", None), torch.Tensor):
            yield "its attention has learned sinks"
        head_dim = getattr(module, "head_dim", None)
        keys, values = (
            getattr(getattr(module, name, None), "out_features", None) for name in ("k_proj", "v_proj")
        )
        if number not in full or keys is None:
            continue
        widths.add(keys)
        value_dim = getattr(module, "v_head_dim", None)
        if keys != (keys if values is None else values) or value_dim not in (None, head_dim):
            yield "its keys and values have different head dimensions"
        if len(widths) > 1:
            yield "its layers have different numbers of KV heads or head dimensions"
        if isinstance(head_dim, int) and (head_dim > MAX_HEAD_DIM or head_dim % 8):
            yield f"its head dimension is {head_dim}: multiples of 8 up to {MAX_HEAD_DIM} are supported"
