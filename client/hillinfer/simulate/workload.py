"""What is computed: shapes of models, and a decode step's sizes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Shape of a decoder, 2-byte weights and KV. Source: the models' published configurations."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: float


LONGCHAT_7B = Model("LongChat-7B", 32, 32, 32, 128, 6.74e9)
LLAMA_13B = Model("LLaMA-13B", 40, 40, 40, 128, 13.02e9)
QWEN_7B = Model("Qwen-7B", 32, 32, 32, 128, 7.72e9)
OPT_6_7B = Model("OPT-6.7B", 32, 32, 32, 128, 6.66e9)
SHAPE_8B = Model("8B shape", 32, 32, 8, 128, 8.03e9)


@dataclass(frozen=True)
class Work:
    """A decode step: `batch` sequences of `tokens` tokens, `alpha` of them attended.

    held: share of the KV that slots and host memory hold together, the same for every system.
    key_bits: of evaluation keys.
    """

    model: Model
    batch: int
    tokens: int
    alpha: float
    held: float
    key_bits: int = 4

    @property
    def row_bytes(self) -> int:
        """K and V of one token and KV head."""
        return 2 * self.model.head_dim * 2

    @property
    def streams(self) -> int:
        """Sequences x KV heads, of one layer."""
        return self.batch * self.model.kv_heads

    @property
    def kv(self) -> float:
        """KV bytes of one layer."""
        return float(self.streams * self.tokens * self.row_bytes)

    @property
    def key_bytes_per_token(self) -> int:
        """Evaluation keys of one token, all streams of one layer."""
        return self.streams * self.model.head_dim * self.key_bits // 8

    @property
    def attended(self) -> int:
        """Tokens attended by each sequence."""
        return round(self.alpha * self.tokens)
