"""Hooks in a model's decoder layers that begin on the next layer when one begins to compute."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch

from hillinfer.pipeline.first import FirstQuery, owner_of
from hillinfer.pipeline.query import (
    LayerQuery,
    cache_of,
    decoder_layers,
    hidden_of,
    is_taking,
    predictable,
)
from hillinfer.pipeline.timeline import COMPUTE, MODEL


class PredictionHooks:
    """In the model until `close`. Raises UnsupportedModel as `decoder_layers` does."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = decoder_layers(model)
        self._known = predictable(model, self._layers)
        self._queries = [LayerQuery(layer, number) for number, layer in enumerate(self._layers)]
        self._hooks = [
            layer.register_forward_pre_hook(self._hook(number), with_kwargs=True)
            for number, layer in enumerate(self._layers)
        ]
        self._hooks.append(self._layers[-1].register_forward_hook(_after_the_last, with_kwargs=True))
        owner = owner_of(model, self._layers)
        self._first = FirstQuery(owner, self._queries[0])
        self._hooks.append(owner.register_forward_pre_hook(self._before_the_first, with_kwargs=True))

    def close(self) -> None:
        """Take the hooks out of the model; idempotent."""
        for hook in self._hooks:
            hook.remove()

    def _before_the_first(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin on the first layer with its own query, before the model prepares anything."""
        cache: Any = kwargs.get("past_key_values")
        pipeline, ids = getattr(cache, "pipeline", None), kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if pipeline is None:
            return
        cache.check_usable()
        pipeline.forget_interrupted(own=True)
        if not pipeline.asks_own or ids is None or ids.shape[1] != 1:
            return
        if cache.layers[0].is_sliding:
            return
        self._first.try_with(kwargs)
        if self._first.usable:
            pipeline.timeline.mark = perf_counter()
            pipeline.before_own(cache.layers[0], lambda: self._first(kwargs))

    def _own(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        query = self._queries[number](args, kwargs)
        if number == 0:
            self._first.compare(query)
        return query

    def _hook(self, number: int) -> Any:
        following = number + 1

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if is_taking():
                return
            cache: Any = cache_of(args, kwargs)
            pipeline = getattr(cache, "pipeline", None)
            if pipeline is None or hidden_of(args, kwargs).shape[1] != 1:
                return
            if number == 0:
                cache.check_usable()
                pipeline.forget_interrupted(own=False)
                pipeline.timeline.mark = pipeline.timeline.mark or perf_counter()
            if not self._known[number] and pipeline.asks_own and not cache.layers[number].is_sliding:
                pipeline.before_own(cache.layers[number], lambda: self._own(number, args, kwargs))
            if following < len(self._layers) and self._known[following]:
                computing, target = cache.layers[number], cache.layers[following]
                if not target.is_sliding:  # the others have nothing to rank
                    pipeline.before(
                        target,
                        lambda: self._queries[following](args, kwargs),
                        None if computing.is_sliding else computing,
                    )

        return before


def _after_the_last(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Note that the last layer has computed; the model's head is not in the timeline."""
    if is_taking():
        return
    cache: Any = cache_of(args, kwargs)
    pipeline = getattr(cache, "pipeline", None)
    if pipeline is not None and pipeline.timeline.mark:
        timeline, last = pipeline.timeline, cache.full_layers[-1].index
        timeline.note(MODEL, COMPUTE, pipeline.layers[last].step - 1, last, timeline.mark)
        timeline.mark = 0.0
