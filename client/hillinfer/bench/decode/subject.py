"""The model that is measured, and the tokens it is given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hillinfer.bench.decode.pace import Gpu
from hillinfer.demo import make_demo
from hillinfer.kv_shape import KvShape
from hillinfer.model_directory import ModelDirectory

QUESTION_TOKENS = 16
"""Of a question to a model that has learnt nothing."""

_ROPE = {"rope_type": "default", "rope_theta": 500000.0}

SHAPES = {
    # Llama-3.1-8B and Llama-3.2-1B: their published configurations. tiny: for tests.
    "8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, rope_parameters=_ROPE,
        max_position_embeddings=1 << 20,
    ),
    "1b": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=128256, rope_parameters=_ROPE,
        max_position_embeddings=1 << 20, tie_word_embeddings=True,
    ),
    "tiny": LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=256, max_position_embeddings=1 << 20,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model by name. load: makes it in a dtype on a device; text: ids [1, n] of that many tokens.

    questions: ids [1, n] each, asked in turn. config: of its text part. learnt: False for random weights,
    whose times are those of a model of the shape, and whose selections are nobody's.
    """

    name: str
    config: Any
    load: Callable[[torch.dtype, str], PreTrainedModel]
    text: Callable[[int], torch.Tensor]
    questions: list[torch.Tensor]
    learnt: bool
    gpu: Gpu | None = None
    """Whose times a stand-in waits for; None for a model that computes."""

    @property
    def kv_shape(self) -> KvShape:
        """Of its KV."""
        return KvShape.of(self.config)


def of_directory(path: Path) -> Subject:
    """Return a local model, to read the demo's text and be asked its questions. Raises UnreadableModel."""
    directory = ModelDirectory(path)

    def ids(text: str) -> torch.Tensor:
        found = directory.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        assert isinstance(found, torch.Tensor)
        return found

    def text(tokens: int) -> torch.Tensor:
        return ids(make_demo(directory.tokenizer, tokens).context)[:, :tokens]

    questions = [ids(f"\n{question}") for question in make_demo(directory.tokenizer, 1024).questions]
    return Subject(path.resolve().name, directory.config, directory.load, text, questions, learnt=True)


def of_shape(name: str) -> Subject:
    """Return a model of one of `SHAPES` with random weights, which reads random tokens."""
    return of_config(f"{name} shape", SHAPES[name])


def of_config(name: str, config: LlamaConfig) -> Subject:
    """Return a model of that configuration with random weights, which reads random tokens."""

    def text(tokens: int, seed: int = 0) -> torch.Tensor:
        numbers = torch.Generator().manual_seed(seed)
        return torch.randint(config.vocab_size, (1, tokens), generator=numbers)

    questions = [text(QUESTION_TOKENS, seed) for seed in range(1, 5)]
    return Subject(name, config, partial(_random, config), text, questions, learnt=False)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the same weights in memory and hooks and attention of its own."""
    kept = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def _random(config: LlamaConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]  # untyped there
            copy.deepcopy(config), dtype=dtype
        )
    assert isinstance(model, PreTrainedModel)
    model.eval()  # type: ignore[no-untyped-call]  # untyped there
    return model
