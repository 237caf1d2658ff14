"""The first layer's own query as soon as a step begins, before the model prepares masks and rotation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hillinfer.pipeline.alone import is_same
from hillinfer.pipeline.query import LayerQuery
from hillinfer_core.errors import UnsupportedModel


class FirstQuery:
    """Made of the token's embedding and its rotation alone, with the parts of a model that has Llama's.

    That is used once it was seen to be, but for rounding (`is_same`), what the first layer makes itself, and
    given up for good if it is not: of models that scale their embeddings, or rotate otherwise. So what it
    selects is what the layer's own query would, computed with sums in another order, as by another number of
    threads: of tokens that score the same to within a step of the INT8 query another may be taken.
    Not thread-safe.
    """

    def __init__(self, owner: Any, layer: LayerQuery) -> None:
        self._layer = layer
        self._embed: Any = getattr(owner, "embed_tokens", None)
        self._rotate: Any = getattr(owner, "rotary_emb", None)
        self._tried = all(isinstance(each, torch.nn.Module) for each in (self._embed, self._rotate))
        self._compared = False
        self._early: torch.Tensor | None = None

    @property
    def usable(self) -> bool:
        """Whether it is known to be the layer's own, but for rounding."""
        return self._tried and self._compared

    def __call__(self, kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the query [B, H, 1, D] of a step with these arguments of the model.

        Raises UnsupportedModel where they are others than Llama's.
        """
        query = self._made_of(kwargs)
        if query is None:
            self._tried = False
            raise UnsupportedModel("the first layer's query cannot be made before the model begins")
        return query

    def _made_of(self, kwargs: dict[str, Any]) -> torch.Tensor | None:
        try:
            hidden = kwargs.get("inputs_embeds")
            hidden = self._embed(kwargs["input_ids"]) if hidden is None else hidden
            positions = kwargs.get("position_ids")
            if positions is None:
                seen = kwargs["past_key_values"].get_seq_length()
                positions = torch.arange(seen, seen + 1, device=hidden.device)[None]
            return self._layer.of_input(hidden, self._rotate(hidden, positions))
        except Exception:  # parts of these names, put together otherwise, raise whatever they happen to
            return None

    def try_with(self, kwargs: dict[str, Any]) -> None:
        """Unless that is known, make the query of a step, which is then to be `compared`."""
        self._early = None
        if self._tried and not self._compared and self._layer.alone:
            self._early = self._made_of(kwargs)
            self._tried = self._early is not None

    def compare(self, own: torch.Tensor) -> None:
        """See what the first layer made of the same step. Waits for the device."""
        early, self._early = self._early, None
        if early is not None:
            self._compared = self._tried = is_same(early, own)


def owner_of(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """Return the part of `model` whose forward runs through `layers`, or rather has them."""
    return next(
        module
        for module in model.modules()
        if any(isinstance(part, torch.nn.ModuleList) and layers[0] in part for part in module.children())
    )
