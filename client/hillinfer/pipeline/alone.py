"""A layer's query alone, without the keys and values that the layer makes beside it: two ways.

Both take the parts that Llama has. Neither knows whether it is the layer's own query: that is for
who uses it to see (`is_same`).
"""

from __future__ import annotations

from itertools import chain
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

    def __call__(self, hidden: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        """Return the query float32 [B, H, n, D]; None where that takes other parts, or more threads.

        hidden: [B, n, E]; rotation: cosines and sines [B or 1, n, D].
        """
        made_by = self._parts() if all(map(_is_given, (hidden, *rotation))) else None
        if made_by is None or made_by.weight.nbytes * hidden.shape[:2].numel() > NATIVE_BYTES:
            return None
        given, cosines, sines = (each.detach().numpy() for each in (hidden, *rotation))
        return torch.from_numpy(make_query(given, made_by, cosines, sines))

    def _parts(self) -> QueryParts | None:
        norm, project = self._layer.input_layernorm, self._attention.q_proj
        weight, bias = project.weight, project.bias
        norms = [norm, self._attention.q_norm] if self._head_norm else [norm]
        parameters = [each.weight for each in norms] + ([weight] if bias is None else [weight, bias])
        plain = type(project) is torch.nn.Linear and all(map(_is_plain, (*norms, project)))
        if not plain or not all(map(_is_own, parameters)):
            return None
        factors, *of_heads = ((each.weight.detach().numpy(), each.variance_epsilon) for each in norms)
        bias = None if bias is None else bias.detach().numpy()
        return QueryParts(*factors, weight.detach().numpy(), bias, *chain(*of_heads))


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


def _is_own(parameter: Any) -> bool:
    """Whether the host reads it as it is: no subclass that quantises or shards, no other device or dtype."""
    if type(parameter) is not torch.nn.Parameter or parameter.dtype is not torch.float32:
        return False
    return parameter.is_cpu and parameter.is_contiguous()


def _is_given(tensor: Any) -> bool:
    return type(tensor) is torch.Tensor and tensor.dtype is torch.float32 and tensor.is_cpu
