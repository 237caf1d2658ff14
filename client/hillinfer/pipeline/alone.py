"""A layer's query alone, without the keys and values that the layer makes beside it: two ways.

Both take the parts that Llama has. Neither knows whether it is the layer's own query: that is for
who uses it to see (`is_same`).
"""

from __future__ import annotations

from typing import Any

import torch

from hillinfer_core.predict import QueryParts, is_near, make_query

ROUNDING = 1e-5
"""Of a head's length: how far two queries may be apart that are the same but for the order of their sums.

The sums of a few thousand floats are apart by less than a tenth of it; a step of the INT8 query that ranks
is 1/127 of a head's greatest number, a hundred times more and above. A rotation by one more position, or a
scale of 1.0001, is beyond. Our choice."""

NATIVE_BYTES = 4 << 20
"""Of a weight, for each token, that one thread is to read: with 64 MiB it still is as soon as torch, on two
cores, with AVX2 and with AVX-512 (docs/pipeline.md). Less, as others have more cores: our choice."""


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_same(query: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether two queries [B, H, n, D] are the same but for rounding. Waits for the device.

    Never where there are numbers that are not finite.
    """
    one, other = (each.detach().float().cpu().numpy() for each in (query, own))
    return is_near(one, other, ROUNDING)


class Native:
    """In one call of native code, on the CPU in float32: see `make_query`.

    Its parts are looked at anew in each call, as they may be replaced, moved, hooked or wrapped meanwhile.
    """

    def __init__(self, layer: Any) -> None:
        self._layer, self._attention = layer, layer.self_attn
        self._head_norm = hasattr(self._attention, "q_norm")
        self._known: tuple[Any, ...] = ()
        self._made_by: QueryParts | None = None

    def __call__(self, hidden: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        """Return the query float32 [B, H, n, D]; None where that takes other parts, or more threads.

        hidden: [B, n, E]; rotation: cosines and sines [B or 1, n, D].
        """
        made_by = self._parts() if all(map(_is_float, (hidden, *rotation))) else None
        if made_by is None or made_by.weight.nbytes * hidden.shape[:2].numel() > NATIVE_BYTES:
            return None
        given, cosines, sines = (each.detach().numpy() for each in (hidden, *rotation))
        return torch.from_numpy(make_query(given, made_by, cosines, sines))

    def _parts(self) -> QueryParts | None:
        modules = [self._layer.input_layernorm, self._attention.q_proj]
        if self._head_norm:
            modules.append(self._attention.q_norm)
        if not all(map(_is_plain, modules)):
            return None
        parameters = [each for module in modules for each in module._parameters.values() if each is not None]
        if any(type(each) is not torch.nn.Parameter for each in parameters):
            return None  # of a subclass, that quantises or shards
        # Views keep the memory of what is known, so that nothing else has come to lie there.
        found = modules, [each.data_ptr() for each in parameters]
        if found != self._known:
            readable = all(_is_float(each) and each.is_contiguous() for each in parameters)
            self._known, self._made_by = found, _parts_of(*modules) if readable else None
        return self._made_by


class InTorch:
    """With the layer's own norm and projection; of any dtype, on any device."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._attention = layer, layer.self_attn
        self._head_norm = hasattr(self._attention, "q_norm")

    def __call__(self, hidden: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the query [B, H, n, D] by norm, projection and rotation as Llama has them: see `Native`."""
        attention, size = self._attention, rotation[0].shape[-1]
        query = attention.q_proj(self._layer.input_layernorm(hidden)).view(*hidden.shape[:-1], -1, size)
        if self._head_norm:
            query = attention.q_norm(query)
        query, half = query.transpose(1, 2), size // 2
        cos, sin = (each.unsqueeze(1) for each in rotation)
        turned = torch.cat((-query[..., half:], query[..., :half]), -1)
        alone: torch.Tensor = query * cos + turned * sin
        return alone


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether calling it is its class's `forward` and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _is_float(tensor: Any) -> bool:
    """Whether native code reads it as it is."""
    return type(tensor) in _PLAIN and tensor.dtype is torch.float32 and tensor.is_cpu


def _parts_of(norm: Any, project: Any, head_norm: Any = None) -> QueryParts | None:
    norms = [norm] if head_norm is None else [norm, head_norm]
    # Llama's norms have this name for it; others, as Gemma's, do something else with their weight.
    if type(project) is not torch.nn.Linear or not all(hasattr(each, "variance_epsilon") for each in norms):
        return None
    factors, *of_heads = (each.weight.detach().numpy() for each in norms)
    return QueryParts(
        factors,
        norm.variance_epsilon,
        project.weight.detach().numpy(),
        None if project.bias is None else project.bias.detach().numpy(),
        of_heads[0] if of_heads else None,
        0.0 if head_norm is None else head_norm.variance_epsilon,
    )
