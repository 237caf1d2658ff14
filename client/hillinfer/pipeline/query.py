"""The query that a decoder layer would make of a given input: what `next_layer` ranks with.

The layer is run up to its attention, which hands the query over and goes no
further. So normalisation, fused projections, norms of the query and any form of
RoPE are the model's own, whatever its family. Where the same query comes of less,
that is computed instead (`LayerQuery`, alone.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers.cache_utils import Cache

from hillinfer.pipeline.alone import InTorch, Native, is_same
from hillinfer_core.errors import UnsupportedModel

Way = Callable[[torch.Tensor, tuple[torch.Tensor, ...]], torch.Tensor | None]
"""To a query [B, H, n, D], of an input and a rotation; None where it does not serve."""

_taking = threading.local()

_COMPARED_EVERY = 32
"""Of the uses of a shortcut one in so many is compared: further on a layer may rotate or scale otherwise."""


class QueryTaken(Exception):  # noqa: N818 - not an error
    """Carries a query out of the layer that made it; never leaves `layer_query`."""

    def __init__(self, query: torch.Tensor) -> None:
        self.query = query


def is_taking() -> bool:
    """Whether this thread runs a layer only for its query: hooks and attention have nothing else to do."""
    return getattr(_taking, "active", False)


def decoder_layers(model: torch.nn.Module) -> Sequence[torch.nn.Module]:
    """Return the decoder layers in the order of their cache layers.

    Raises UnsupportedModel for models whose layers do not stand in one list.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[union-attr, operator]
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            numbers = [{getattr(part, "layer_idx", None) for part in layer.modules()} for layer in module]
            if all(number in found for number, found in enumerate(numbers)):
                return list(module)
    raise UnsupportedModel(
        f"{type(model).__name__} has no single list of decoder layers whose queries could be predicted: "
        "use the predictor exact"
    )


def predictable(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> list[bool]:
    """Say for each decoder layer whether the layer before it sees what its query needs.

    The first has none before it. Where the rotation differs by kind of layer, neighbours must be of one kind.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    kinds = getattr(config, "layer_types", None) or [None] * len(layers)
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = any(kind in rope for kind in kinds if kind is not None)
    alike = [not by_kind or mine == before for before, mine in pairwise(kinds)]
    return [False, *alike]


def cache_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Cache | None:
    """Return the cache among the arguments of a decoder layer."""
    return next((each for each in (*args, *kwargs.values()) if isinstance(each, Cache)), None)


def hidden_of(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the input [B, n, E] among the arguments of a decoder layer."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def layer_query(layer: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the query [B, H, n, D], after RoPE, that `layer` makes of these arguments.

    The model must be attached. The cache among the arguments is left alone. Raises
    UnsupportedModel when the layer ends without attention.
    """
    args = [None if isinstance(each, Cache) else each for each in args]
    kwargs = {name: None if isinstance(each, Cache) else each for name, each in kwargs.items()}
    _taking.active = True
    try:
        layer(*args, **kwargs)
    except QueryTaken as taken:
        return taken.query
    finally:
        _taking.active = False
    raise UnsupportedModel(f"{type(layer).__name__} made no query: use the predictor exact")


class LayerQuery:
    """`layer_query` of one decoder layer; the query alone, without keys and values, where that is the same.

    That is tried where the layer has the parts of Llama's, first in native code, then with torch. A way is
    given up for good if its query is not, but for rounding (`is_same`), what the layer itself hands over: at
    its first use and every 32nd. Not thread-safe.
    """

    def __init__(self, layer: torch.nn.Module, number: int) -> None:
        self._layer: Any = layer
        self._uses = number  # so that layers are not all compared in the same step
        self._compared = False
        attention = getattr(layer, "self_attn", None)
        parts = getattr(layer, "input_layernorm", None), getattr(attention, "q_proj", None)
        self._size = getattr(attention, "head_dim", None)
        has_parts = all(isinstance(each, torch.nn.Module) for each in parts) and isinstance(self._size, int)
        self.ways: list[Way] = [Native(layer), InTorch(layer)] if has_parts else []
        """To compute it alone, the best first, which is the one in use once it was compared."""

    @property
    def alone(self) -> bool:
        """Whether the query is computed alone."""
        return self._compared and bool(self.ways)

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the query [B, H, n, D]; see `layer_query`.

        Waits for the device where it is compared.
        """
        if not self.ways:
            return layer_query(self._layer, args, kwargs)
        hidden, rotation = hidden_of(args, kwargs), kwargs.get("position_embeddings")
        self._uses += 1
        if self._compared and self._uses % _COMPARED_EVERY:
            query = self._made(self.ways[0], hidden, rotation)
            if query is not None:
                return query
        own = layer_query(self._layer, args, kwargs)
        while self.ways and not self._is_same(self.ways[0], own, hidden, rotation):
            del self.ways[0]
        self._compared = True
        return own

    def _is_same(self, way: Way, own: torch.Tensor, hidden: torch.Tensor, rotation: Any) -> bool:
        try:
            query = self._made(way, hidden, rotation)
        except Exception:  # parts of these names, put together otherwise, raise whatever they happen to
            return False
        return query is not None and is_same(query, own)

    def _made(self, way: Way, hidden: torch.Tensor, rotation: Any) -> torch.Tensor | None:
        fits = isinstance(rotation, tuple) and rotation[0].shape[-1] == self._size
        return way(hidden, rotation) if fits else None

    def of_input(self, hidden: torch.Tensor, rotation: Any) -> torch.Tensor | None:
        """Return the query [B, H, n, D] by norm, projection and rotation as Llama has them, while `alone`.

        hidden: [B, n, E]; rotation: cosines and sines [B, n, D]. None where they cannot be applied. Where
        the way in use does not serve any more, it comes of one that nothing was compared with.
        """
        made = (self._made(way, hidden, rotation) for way in self.ways)
        return next((query for query in made if query is not None), None)
