"""The shape of a model's KV, as its configuration tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hillinfer.hkm.tensors import row_dtype
from hillinfer_core.errors import UnsupportedModel
from hillinfer_core.layout import Shape


@dataclass(frozen=True)
class KvShape:
    """KV heads of each layer, and numbers of a key."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def numbers(self) -> int:
        """Numbers of K and V of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def append_unit(self, dtype: torch.dtype) -> int:
        """Tokens that rows of `dtype` are appended in multiples of. Raises UnsupportedModel for others."""
        return Shape(self.layers, self.kv_heads, self.head_dim, row_dtype(dtype)).append_unit

    @classmethod
    def of(cls, config: Any) -> KvShape:
        """Return the shape for a text configuration of transformers, which maps a family's own names.

        Raises UnsupportedModel for a model without attention heads.
        """
        heads = getattr(config, "num_attention_heads", None)
        if not isinstance(heads, int):  # a list, where they differ by layer
            raise UnsupportedModel(
                f"{config.model_type} models are not supported: there is no one number of attention heads"
            )
        # OPT, GPT-2, GPT-NeoX and others from before grouped queries have neither name.
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.num_hidden_layers, kv_heads, head_dim)
