"""What a saved context was made from: KV is of use only to the same model on the same text."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

SAMPLES = 1024
"""Numbers taken of each weight tensor: quick also for large models, and no training keeps them all."""


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return the SHA-256, in hex, of the model as it computes now.

    It covers the configuration (rotary embedding and positions included), and
    of everything in `state_dict` the name, dtype, shape, and up to `SAMPLES`
    evenly spaced numbers, first and last included. Where the model lies and how
    it attends do not count. Weights that are offloaded count without their numbers.
    """
    text = model.config.get_text_config(decoder=True).to_dict()
    settings = {
        name: value
        for name, value in text.items()
        if not name.startswith("_") and name not in ("transformers_version", "attn_implementation")
    }
    digest = hashlib.sha256(
        json.dumps([type(model).__name__, settings], sort_keys=True, default=str).encode()
    )
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.device.type != "meta" and tensor.numel():
            digest.update(_sample(tensor))
    return digest.hexdigest()


def tokens_fingerprint(ids: torch.Tensor) -> str:
    """Return the SHA-256, in hex, of token ids of any shape, read as little-endian int64."""
    return hashlib.sha256(ids.detach().cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _sample(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
    numbers: Any = flat[places.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy()
    return bytes(numbers.tobytes())
