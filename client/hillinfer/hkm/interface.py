"""The attention function and the mask that transformers calls for a model under HKM."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from hillinfer.hkm.attention import attend_capped
from hillinfer.hkm.layer import LAYER_ATTRIBUTE
from hillinfer.pipeline.query import QueryTaken, is_taking
from hillinfer_core.errors import UnsupportedModel

ATTENTION_NAME = "hillinfer"


def register() -> None:
    """Make attention and mask known to transformers under ATTENTION_NAME; idempotent."""
    AttentionInterface.register(ATTENTION_NAME, attention)
    AttentionMaskInterface.register(ATTENTION_NAME, mask)


def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return the padding mask alone, bool [B, columns] or None: a full mask would grow with the context.

    Sliding layers and masks that are not plainly causal get the full mask of sdpa.
    """
    if kwargs.get("local_size") is not None or kwargs.get("mask_function") is not causal_mask_function:
        full: torch.Tensor | None = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
        return full
    padding: torch.Tensor | None = kwargs.get("attention_mask")
    return None if padding is None or bool(padding.all()) else padding


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: [B, H, n, D] in, ([B, n, H, D], None) out."""
    if is_taking():
        raise QueryTaken(query)
    layer = getattr(key, LAYER_ATTRIBUTE, None)
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModel(f"{type(module).__name__} has sinks of its own, which is not supported")
    if layer is not getattr(value, LAYER_ATTRIBUTE, None):
        raise UnsupportedModel(f"{type(module).__name__} changes keys or values after the cache")
    if layer is None:
        return _plain(module, query, key, value, attention_mask, scaling, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModel(f"{type(module).__name__} adds a bias to its scores, which is not supported")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedModel(
            f"{type(module).__name__} uses a mask that is not causal, which is not supported"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = layer.attend(query, key, value, attention_mask, scale, kwargs.get("softcap"))
    return output.transpose(1, 2).contiguous(), None


def _plain(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """A layer that HKM does not keep: sdpa, with the causal mask that `mask` left out."""
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if is_causal and (attention_mask is None or attention_mask.ndim == 2):
        queries, columns = query.shape[2], key.shape[2]
        rows = torch.arange(columns - queries, columns, device=query.device)[:, None]
        causal = (torch.arange(columns, device=query.device)[None] <= rows)[None, None]
        attention_mask = (
            causal if attention_mask is None else causal & attention_mask[:, None, None, :columns]
        )
    if softcap is not None:
        group = query.shape[1] // key.shape[1]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        capped = attend_capped(query, keys, values, scale, softcap, attention_mask)
        return capped.transpose(1, 2).contiguous(), None
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return output
