"""A model of a large one's shape with random weights, and caches filled with the workload's KV.

Its answers mean nothing; its arithmetic, its bytes and, by the recorded queries, its selections are those of
such a model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hillinfer.bench.kvpath.workload import LayerShape, Workload

# Llama-3.1-8B and Llama-3.2-1B: their published configurations.
_WIDTHS = {"8b": (4096, 14336, 128256), "1b": (2048, 8192, 128256)}


def synthetic_model(
    name: str, shape: LayerShape, layers: int, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    """Return a Llama of `shape` with `layers` layers and random weights, made where it runs."""
    hidden, intermediate, vocabulary = _WIDTHS[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=1 << 20,
        dtype=dtype,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: PreTrainedModel = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def filled_cache(model: PreTrainedModel, workload: Workload, offloaded: bool) -> DynamicCache:
    """Return transformers' cache with the workload's KV in every layer, on the model's device or offloaded."""
    cache = DynamicCache(config=model.config, offloading=offloaded)
    for number in range(model.config.num_hidden_layers):
        keys, values = (
            torch.from_numpy(each[number % workload.layers])[None].to(model.device, model.dtype)
            for each in (workload.keys, workload.values)
        )
        cache.update(keys, values, number)
    return cache


class RecordedQueries:
    """A `QueryPredictor` that ranks with the workload's queries, step after step, and not with the model's."""

    def __init__(self, workload: Workload) -> None:
        self._queries = workload.queries
        self.step = 0

    def ranking_query(self, layer: int, exact: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """See `QueryPredictor.ranking_query`."""
        step = self._queries[self.step % len(self._queries)]
        return np.broadcast_to(step[layer % len(step)], exact.shape)


def peak_bytes(device: str) -> int | None:
    """Bytes of the accelerator's memory that were taken at most since the last reset; None without one."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None


def reset_peak(device: str) -> None:
    """Begin to count anew."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def wait_for(device: str) -> None:
    """Return when the device is done: only for the clock of a measurement."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def as_json(value: Any) -> Any:
    """Return numbers rounded for printing."""
    return round(value, 4) if isinstance(value, float) else value
