"""Exact attention over parts of the keys, and how parts become the whole.

Softmax over a union of key sets follows from each set's output and its
log-sum-exp (the online softmax of Milakov and Gimelshein, 2018), so a cold
context is attended block by block in bounded memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hillinfer_core.attend import Attended, attend

ALONE_BYTES = 1 << 20
"""Keys and values that one thread attends to as soon as several that have to be woken: of 2.6 MB on two
cores, with AVX2 (docs/decode.md). Less, as others have more cores: our choice."""

_KEY_BLOCK = 512  # keys per score matrix where no fused kernel returns the log-sum-exp
_QUERY_BLOCK = 256  # queries per score matrix where scores are capped and masked


@dataclass(frozen=True)
class Part:
    """Attention over one set of keys.

    output: float32 [heads, queries, head_dim], normalised over this set.
    lse: float32 [heads, queries], the log of the sum of exp(score).
    """

    output: torch.Tensor
    lse: torch.Tensor


def attend_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    *,
    causal: bool = False,
    softcap: float | None = None,
) -> Part:
    """Attend `query` [H, q, D] to `key` and `value` [Hkv, n, D], H a multiple of Hkv, n at least 1.

    With `causal`, n must equal q and query i sees keys 0..i; otherwise every
    query sees every key. With `softcap` c, scores s become c * tanh(s / c)
    (Gemma 2, arXiv 2408.00118, section 2).
    """
    heads, queries, dim = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    if causal:
        key = key.repeat_interleave(group, 0)
        value = value.repeat_interleave(group, 0)
        folded = query
    else:
        # Without a mask the heads of a group are just more queries on the same keys.
        folded = query.reshape(kv_heads, group * queries, dim)
    fused = None if softcap is not None else _fused(folded, key, value, scaling, causal)
    output, lse = fused or _attend_in_blocks(folded, key, value, scaling, causal, softcap)
    return Part(output.reshape(heads, queries, dim), lse.reshape(heads, queries))


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Output and log-sum-exp by a kernel of torch that returns both; None where it has none for such tensors.

    These kernels are what `scaled_dot_product_attention`, which keeps the log-sum-exp to itself, calls.
    """
    kernels, whole = torch.ops.aten, (query[None], key[None], value[None])
    if query.device.type == "cpu":
        found = kernels._scaled_dot_product_flash_attention_for_cpu(*whole, 0.0, causal, scale=scaling)
    elif query.device.type != "cuda":
        return None
    else:
        asked = torch.backends.cuda.SDPAParams(*whole, None, 0.0, causal, False)
        if torch.backends.cuda.can_use_flash_attention(asked):
            found = kernels._scaled_dot_product_flash_attention(*whole, 0.0, causal, False, scale=scaling)
        elif torch.backends.cuda.can_use_efficient_attention(asked):
            found = kernels._scaled_dot_product_efficient_attention(
                *whole, None, True, 0.0, causal, scale=scaling
            )
        else:
            return None
    output, lse = found[0][0].float(), found[1][0].float()
    # The efficient kernel pads the queries of its log-sum-exp.
    return output, lse[:, : query.shape[1]]


def merge(parts: list[Part]) -> torch.Tensor:
    """Combine parts over disjoint key sets: float32 [heads, queries, head_dim]."""
    if len(parts) == 1:
        return parts[0].output
    lses = torch.stack([part.lse for part in parts])
    weights = torch.exp(lses - torch.logsumexp(lses, 0))
    output = torch.zeros_like(parts[0].output)
    for part, weight in zip(parts, weights, strict=True):
        output += part.output * weight[..., None]
    return output


def join(one: Part, other: Part) -> Part:
    """Combine two parts over disjoint key sets, of which every query sees at least one key each."""
    weight = torch.sigmoid(one.lse - other.lse)
    output = torch.lerp(other.output, one.output, weight[..., None])
    return Part(output, torch.logaddexp(one.lse, other.lse))


def attend_stored(query: torch.Tensor, attended: Attended, scaling: float) -> torch.Tensor:
    """As `attend_slots`, on the CPU and in the thread that calls, which is faster up to `ALONE_BYTES`.

    attended: of keys and values [B * Hkv, n, D].
    """
    batch, heads, _, dim = query.shape
    wide = (query if query.dtype is torch.float32 else query.float()).numpy()
    # Of one KV head and several sequences even a reshaped view may be strided.
    grouped = np.ascontiguousarray(wide.reshape(len(attended.keys), -1, dim))
    output = attend(grouped, attended, scaling)
    return torch.from_numpy(output.reshape(batch, heads, 1, dim)).to(query.dtype)


def attend_slots(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    visible: torch.Tensor | None,
    softcap: float | None = None,
) -> torch.Tensor:
    """One decode step: `query` [B, H, 1, D] on `key` and `value` [B, Hkv, n, D].

    `visible`: bool [B, Hkv, n], or None when every key is visible. Returns [B, H, 1, D].
    """
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    folded = query.reshape(batch, kv_heads, heads // kv_heads, dim)
    mask = None if visible is None else visible[:, :, None, :]
    if softcap is not None:
        return attend_capped(folded, key, value, scaling, softcap, mask).reshape(batch, heads, 1, dim)
    output = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=mask, scale=scaling
    )
    return output.reshape(batch, heads, 1, dim)


def attend_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    softcap: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Capped attention of `query` [B, H, q, D] on `key` and `value` [B, H, n, D] under a mask, [B, H, q, D].

    mask: bool, broadcast to [B, H, q, n], True where a query sees a key; or None.
    """
    outputs = []
    for start in range(0, query.shape[2], _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        scores = _capped((query[:, :, block] @ key.transpose(-1, -2)).float() * scaling, softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, block], float("-inf"))
        # A query that sees nothing, as padding does, has zeros and not NaN.
        outputs.append(torch.softmax(scores, -1).nan_to_num().to(value.dtype) @ value)
    return torch.cat(outputs, 2)


def _capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _attend_in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    causal: bool,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    parts = []
    for start in range(0, key.shape[1], _KEY_BLOCK):
        block = slice(start, start + _KEY_BLOCK)
        scores = _capped((query @ key[:, block].transpose(-1, -2)).float() * scaling, softcap)
        if causal:
            rows = torch.arange(query.shape[1], device=query.device)[:, None]
            columns = start + torch.arange(scores.shape[-1], device=query.device)[None]
            scores = scores.masked_fill(columns > rows, float("-inf"))
        lse = torch.logsumexp(scores, -1)
        # A query that sees nothing of this block has lse -inf and must weigh nothing, not NaN.
        weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
        parts.append(Part((weights.to(value.dtype) @ value[:, block]).float(), lse))
    return merge(parts), torch.logsumexp(torch.stack([part.lse for part in parts]), 0)
