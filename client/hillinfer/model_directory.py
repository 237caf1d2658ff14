"""Reading a local transformers model directory, with errors that name what is wrong with it."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.utils import logging

from hillinfer.hkm.coverage import kept_layers
from hillinfer.kv_shape import KvShape
from hillinfer_core.errors import InvalidInput, UnreadableModel, UnsupportedModel

WEIGHTS = ("*.safetensors", "*.bin")


def bundled_model() -> Path:
    """Return the directory of the model that ships with the package."""
    return Path(str(importlib.resources.files("hillinfer"))) / "models" / "needle-8m"


def device_named(name: str) -> str:
    """Return the device called `name`, as torch has it; "auto" is the first GPU where there is one.

    Raises InvalidInput for one that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        raise InvalidInput(f"there is no device {name!r} here: use auto, cpu, or cuda with a GPU") from None
    return name


def dtype_named(name: str) -> torch.dtype:
    """Return torch's dtype of that name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


class ModelDirectory:
    """A local model; nothing is downloaded and no code from the directory runs.

    Configuration and tokeniser are read when first used, the weights by
    `load`. All raise UnreadableModel.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise UnreadableModel(f"{path} is not a directory")
        if not (path / "config.json").is_file():
            raise UnreadableModel(f"{path} has no config.json: name the directory of a transformers model")
        if not any(file for pattern in WEIGHTS for file in path.glob(pattern)):
            raise UnreadableModel(f"{path} has no weights (*.safetensors or *.bin)")

    @cached_property
    def config(self) -> Any:
        """The text part of the model's configuration."""
        return self._read("configuration", AutoConfig.from_pretrained).get_text_config(decoder=True)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokeniser."""
        tokenizer = self._read("tokeniser", AutoTokenizer.from_pretrained)
        # Where the files are missing, transformers makes one that knows no text.
        if not tokenizer("text", add_special_tokens=False)["input_ids"]:
            older = [name for name in tokenizer.vocab_files_names.values() if name != "tokenizer.json"]
            raise UnreadableModel(
                f"{self.path} has no tokeniser: put the model's tokenizer_config.json and tokenizer.json "
                + (f"there, or {' and '.join(older)}" if older else "there")
            )
        return tokenizer

    @property
    def positions(self) -> int | None:
        """Tokens that the model can tell apart, or None where its configuration has no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model was saved in; float32 where its configuration does not say."""
        dtype = getattr(self.config, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of K and V of one token in all layers. Raises UnsupportedModel as `KvShape.of`."""
        return KvShape.of(self.config).numbers * dtype.itemsize

    def append_unit(self, dtype: torch.dtype) -> int:
        """See `KvShape.append_unit`. Raises UnsupportedModel as `KvShape.of`."""
        return KvShape.of(self.config).append_unit(dtype)

    def window_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of K and V that the layers with sliding windows hold; they stay in memory.

        Raises UnsupportedModel for a model whose layers keep something else.
        """
        try:
            layers = kept_layers(self.config)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{self.config.model_type} models are not supported: {error}") from error
        windows = (each.sliding_window for each in layers if isinstance(each, DynamicSlidingWindowLayer))
        return sum(windows) * self.row_bytes(dtype) // len(layers)

    def load(self, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
        """Return the model in evaluation mode on `device`; InvalidInput where its memory does not suffice."""
        model = self._read("weights", AutoModelForCausalLM.from_pretrained, dtype=dtype)
        assert isinstance(model, PreTrainedModel)
        model.eval()  # type: ignore[no-untyped-call]
        try:
            model.to(device)  # type: ignore[arg-type]
        except torch.OutOfMemoryError:
            raise InvalidInput(f"the model's weights do not fit on {device}: use another --device") from None
        return model

    def _read(self, what: str, reader: Callable[..., Any], **options: Any) -> Any:
        # Its warnings and its progress bar are for notebooks; ours say what matters here.
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            return reader(self.path, local_files_only=True, **options)
        except Exception as error:  # every format has errors of its own, all mean the same here
            first = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise UnreadableModel(f"cannot read the {what} of {self.path}: {first[0]}") from error
