"""A model of a shape whose layers do not multiply but wait as long as a GPU would compute.

For what surrounds a model at a GPU's speed: queries wander as a model's do, keys and values are made up.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hillinfer.bench.decode.pace import Gpu, Pace
from hillinfer.bench.decode.subject import QUESTION_TOKENS, Subject
from hillinfer.hkm.cache import HierarchicalCache
from hillinfer.simulate.workload import Model

STEP_COSINE = 0.95
"""Of a query and that of the step before. Of normal keys, 69 % of the best 2 % then stay."""

PREDICTED_COSINE = 0.998
"""Of a predicted query and the layer's own. Of normal keys, 94 % of the best 2 % are then the same: the
simulator's `prediction_loss`. A model's attention gathers on fewer tokens, and bears 0.87."""

_SMALL = 64  # hidden size: what is between the layers carries nothing


class StandInLayer(torch.nn.Module):
    """A decoder layer for steps of one token; it hands its input on."""

    def __init__(self, config: LlamaConfig, index: int, pace: Pace) -> None:
        super().__init__()
        self.layer_idx, self._config, self._pace = index, config, pace
        self._dim = pace.gpu.model.head_dim
        self._scaling = self._dim**-0.5
        self._query: torch.Tensor | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Return hidden_states [B, 1, E]; without a cache the query alone is wanted: attention takes it."""
        pace, model = self._pace, self._pace.gpu.model
        pace.begin()
        attend = ALL_ATTENTION_FUNCTIONS[self._config._attn_implementation]
        batch = hidden_states.shape[0]
        if self._query is None:
            self._query = hidden_states.new_empty(batch, model.heads, 1, self._dim).normal_()
        size = (2, batch, model.kv_heads, 1, self._dim)
        key, value = torch.randn(size, dtype=hidden_states.dtype, device=hidden_states.device)
        if past_key_values is None:
            predicted = turned(self._query, PREDICTED_COSINE)
            pace.predicted()
            attend(self, predicted, key, value, None, scaling=self._scaling)
            raise AssertionError("attention takes a query that is asked for without a cache")
        pace.projected()
        key, value = past_key_values.update(key, value, self.layer_idx)
        if isinstance(past_key_values, HierarchicalCache):
            with _AttentionOnGpu():
                attend(self, self._query, key, value, attention_mask, scaling=self._scaling)
            layer = past_key_values.full_layers[self.layer_idx]
            tokens = layer.get_seq_length() if layer.attended_all else layer.slots.attended
            # Its attention begins when what was selected is in its place.
            pace.attended(past_key_values.pipeline.timeline.mark, tokens)
        elif isinstance(past_key_values, CountedCache):
            tokens = past_key_values.get_seq_length()
            pace.attended(pace.now(), tokens, pace.gpu.offloaded_s(tokens * past_key_values.offloaded))
        self._query = turned(self._query, STEP_COSINE)
        return hidden_states


class _AttentionOnGpu(TorchFunctionMode):
    """Leaves out attention itself, which is in the GPU's time; all around it stays."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return args[0]
        return func(*args, **(kwargs or {}))


def turned(query: torch.Tensor, cosine: float) -> torch.Tensor:
    """Return a query at about that cosine to `query`, of the same length in the mean."""
    return query * cosine + torch.randn_like(query) * math.sqrt(1 - cosine**2)


class CountedCache(Cache):
    """A cache that counts tokens and holds none; offloaded: as if they were in the host's memory."""

    def __init__(self, layers: int, offloaded: bool) -> None:
        self.offloaded = offloaded
        self._counted = [_CountedLayer() for _ in range(layers)]
        super().__init__(layers=[*self._counted])

    def fill(self, tokens: int) -> None:
        """Count so many more."""
        for layer in self._counted:
            layer.tokens += tokens


class _CountedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # untyped there
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped there
        self.tokens = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.tokens += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # attention sees the new token alone

    def get_max_length(self) -> int:
        return -1


def paced(subject: Subject, gpu_name: str, batch: int) -> Subject:
    """Return the stand-in for `subject`, paced to one of `simulate.machine.GPUS`.

    Its layers take the time of 2-byte weights and KV. Raises InvalidInput for an unknown name and for
    weights that the GPU has no room for.
    """
    config, kv = subject.config, subject.kv_shape
    model = Model(
        subject.name, kv.layers, config.num_attention_heads, kv.kv_heads, kv.head_dim, parameters(config)
    )
    gpu = Gpu(gpu_name, model, batch)
    gpu.check_room(0)

    def load(dtype: torch.dtype, device: str) -> PreTrainedModel:
        small = LlamaConfig(
            hidden_size=_SMALL, intermediate_size=_SMALL, num_hidden_layers=model.layers,
            num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, head_dim=model.head_dim,
            vocab_size=2, max_position_embeddings=1 << 20, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        made = LlamaForCausalLM(small)
        pace = Pace(gpu)
        layers = [StandInLayer(made.config, number, pace) for number in range(model.layers)]
        made.model.layers = torch.nn.ModuleList(layers)
        made.pace = pace  # type: ignore[assignment]  # torch: modules or tensors only
        made.to(dtype=dtype, device=device)  # type: ignore[call-arg]  # a decorator hides them
        made.eval()  # type: ignore[no-untyped-call]  # untyped there
        return made

    def text(tokens: int) -> torch.Tensor:
        return torch.zeros((1, tokens), dtype=torch.int64)

    name = f"{subject.name}, compute paced to {gpu_name}"
    return Subject(name, config, load, text, [text(QUESTION_TOKENS)], learnt=False, gpu=gpu)


def parameters(config: Any) -> int:
    """Return how many weights a model of that configuration has; none is made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # untyped there
    return int(model.num_parameters())
