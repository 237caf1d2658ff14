"""The shape of a model, read from the config.json of its directory and from nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hillinfer_core.errors import HillInferError, UnreadableModel, UnsupportedModel
from hillinfer_core.layout import DType, Shape

LARGEST_CONFIG = 16 << 20
"""Bytes of the largest config.json that is read; real ones have a few KiB. Our choice."""


@dataclass(frozen=True)
class Model:
    """What a plan needs of a model. ``evaluated`` lists the layers that look at the whole past."""

    name: str
    shape: Shape
    query_heads: int
    evaluated: tuple[int, ...]
    positions: int | None

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.query_heads // self.shape.kv_heads


def read_model(directory: Path) -> Model:
    """Return the model in ``directory``; weights are neither needed nor read.

    Raises :class:`UnreadableModel` if there is no usable config.json, and :class:`UnsupportedModel` if what
    it describes has no evaluation keys of ours.
    """
    config = _load(directory)
    text = config.get("text_config")
    if isinstance(text, dict):
        config = text
    if "kv_lora_rank" in config:
        raise UnsupportedModel(
            f"{directory} keeps a latent instead of keys (kv_lora_rank): use another model"
        )
    layers = _count(config, "num_hidden_layers", directory)
    query_heads = _count(config, "num_attention_heads", directory)
    kv_heads = query_heads
    if config.get("num_key_value_heads") is not None:
        kv_heads = _count(config, "num_key_value_heads", directory)
    if query_heads % kv_heads:
        raise UnsupportedModel(
            f"{directory}: {query_heads} query heads do not share {kv_heads} KV heads evenly"
        )
    if config.get("head_dim") is not None:
        head_dim = _count(config, "head_dim", directory)
    else:
        head_dim = _count(config, "hidden_size", directory) // query_heads
    shape = Shape(layers, kv_heads, head_dim, _dtype(config, directory))
    try:
        shape.validate()
    except HillInferError as error:
        raise UnsupportedModel(f"{directory}: {error}") from None
    positions = config.get("max_position_embeddings")
    return Model(
        name=directory.resolve().name,
        shape=shape,
        query_heads=query_heads,
        evaluated=_evaluated(config, layers, directory),
        positions=positions if isinstance(positions, int) and positions > 0 else None,
    )


def _load(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        if not directory.is_dir():
            raise UnreadableModel(f"{directory} is not a directory")
        if not path.is_file():
            raise UnreadableModel(
                f"{directory} has no config.json: name the directory of a transformers model"
            )
        with path.open("rb") as file:
            data = file.read(LARGEST_CONFIG + 1)
    except (OSError, ValueError) as error:
        raise UnreadableModel(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > LARGEST_CONFIG:
        raise UnreadableModel(f"{path} is larger than 16 MiB: not the config.json of a model")
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnreadableModel(f"{path} is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise UnreadableModel(f"{path} is not a JSON object")
    return config


def _count(config: dict[str, Any], key: str, directory: Path) -> int:
    value = config.get(key)
    if value is None:
        raise UnsupportedModel(f"{directory}/config.json does not give {key}")
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise UnsupportedModel(
            f"{directory}/config.json: {key} must be a positive whole number, not {value!r:.40}"
        )
    return value


def _dtype(config: dict[str, Any], directory: Path) -> DType:
    # transformers wrote torch_dtype before it wrote dtype; without either, it loads float32.
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in list(DType):
        raise UnsupportedModel(
            f"{directory}/config.json: dtype must be one of {', '.join(DType)}, not {name!r:.40}"
        )
    return DType(name)


def _evaluated(config: dict[str, Any], layers: int, directory: Path) -> tuple[int, ...]:
    kinds = config.get("layer_types")
    if kinds is None:
        return tuple(range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UnsupportedModel(f"{directory}/config.json: layer_types must name each of the {layers} layers")
    # The others see a window or a state that stays on the accelerator.
    found = tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    if not found:
        raise UnsupportedModel(f"{directory} has no layer with full attention: nothing to evaluate")
    return found
