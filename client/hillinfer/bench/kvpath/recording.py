"""Keys and queries of the bundled model over a long text, to rank with at the shape of a larger one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hillinfer.demo import make_demo
from hillinfer.files import check_writable
from hillinfer.model_directory import ModelDirectory, bundled_model
from hillinfer.prefill import chunks
from hillinfer.progress import Progress
from hillinfer_core.errors import InvalidInput

STEPS_OF_AN_ANSWER = 16
"""Decode steps recorded after each of the demo's questions; its answers are about as long."""

_NAME = "hillinfer_kvpath"


@dataclass(frozen=True)
class Recording:
    """Of one text: what its keys were, and what was asked of them in decode steps, question after question.

    keys: float16 [layers, kv_heads, tokens, head_dim] after RoPE; queries: float32
    [steps, layers, heads, head_dim].
    """

    keys: npt.NDArray[np.float16]
    queries: npt.NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write the recording to an .npz file."""
        np.savez(path, keys=self.keys, queries=self.queries)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read what `save` wrote. Raises InvalidInput for anything else."""
        try:
            with np.load(path) as arrays:
                return cls(arrays["keys"], arrays["queries"])
        except (OSError, KeyError, ValueError) as error:
            raise InvalidInput(f"{path} is not a recording of hillinfer bench kvpath ({error})") from None


def recorded(path: Path | None, tokens: int, progress: Progress, device: str = "cpu") -> Recording:
    """Return the recording that is kept at `path`, or make one of the bundled model, and keep it there.

    tokens: of one that is made. Blocks, see `record`. Raises InvalidInput for a file that is no recording.
    """
    if path is not None and path.exists():
        return Recording.load(path)
    check_writable(path)
    made = record(ModelDirectory(bundled_model()), tokens, progress, device)
    if path is not None:
        made.save(path)
    return made


def record(directory: ModelDirectory, tokens: int, progress: Progress, device: str = "cpu") -> Recording:
    """Let the model read `tokens` tokens of the demo's text and answer its questions, with full attention.

    Blocks: reading 32K tokens takes a minute or more on a CPU.
    """
    model = directory.load(torch.float32, device)
    demo = make_demo(directory.tokenizer, tokens)
    ids = directory.tokenizer(demo.context + "\n", return_tensors="pt").input_ids.to(device)
    cache = DynamicCache(config=model.config)
    queries: list[dict[int, npt.NDArray[np.float32]]] = []

    def note(layer: int, query: torch.Tensor) -> None:
        if query.shape[2] == 1:
            if layer == 0:
                queries.append({})
            queries[-1][layer] = query[0, :, 0].float().cpu().numpy().copy()

    with _noting(model, note), torch.inference_mode():
        with progress("recording", ids.shape[1]) as advance:
            for part in chunks(ids.shape[1]):
                model(input_ids=ids[:, part], past_key_values=cache, logits_to_keep=1)
                advance(part.stop)
        keys = [_keys(layer)[0, :, :tokens].half().cpu().numpy() for layer in cache.layers]
        for question in demo.questions:
            asked = directory.tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
            token = _feed(model, asked.to(device), cache)
            for _ in range(STEPS_OF_AN_ANSWER):
                token = _feed(model, token, cache)
    steps = np.stack([np.stack([step[layer] for layer in sorted(step)]) for step in queries])
    return Recording(np.stack(keys), steps)


def _keys(layer: Any) -> torch.Tensor:
    keys: torch.Tensor = layer.keys
    return keys


def _feed(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    token: torch.Tensor = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    return token


@contextmanager
def _noting(model: PreTrainedModel, note: Any) -> Iterator[None]:
    def attention(
        module: torch.nn.Module, query: torch.Tensor, *tensors: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        note(module.layer_idx, query)
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, *tensors, **options)
        return output

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
