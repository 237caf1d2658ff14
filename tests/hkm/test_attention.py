"""Attention in parts equals attention at once."""

from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hillinfer.hkm import attention
from hillinfer.hkm.attention import attend_part, attend_slots, merge


def whole(query, key, value, scaling, mask=None):
    group = query.shape[0] // key.shape[0]
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(group, 0),
        value.repeat_interleave(group, 0),
        attn_mask=mask,
        scale=scaling,
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 20),
    st.lists(st.integers(1, 700), min_size=1, max_size=4),
    st.booleans(),
)
def test_parts_merge_to_the_whole(kv_heads, group, queries, sizes, fused):
    torch.manual_seed(sum(sizes))
    query = torch.randn(kv_heads * group, queries, 16)
    keys = [torch.randn(kv_heads, n, 16) * 3 for n in sizes]
    values = [torch.randn(kv_heads, n, 16) for n in sizes]
    if fused:
        parts = [attend_part(query, k, v, 0.25) for k, v in zip(keys, values, strict=True)]
    else:
        parts = []
        for k, v in zip(keys, values, strict=True):
            out, lse = attention._attend_in_blocks(query.reshape(kv_heads, -1, 16), k, v, 0.25, False)
            parts.append(attention.Part(out.reshape(query.shape), lse.reshape(query.shape[:2])))
    expected = whole(query, torch.cat(keys, 1), torch.cat(values, 1), 0.25)
    torch.testing.assert_close(merge(parts), expected, atol=1e-5, rtol=1e-5)
    joined = reduce(attention.join, parts)
    torch.testing.assert_close(joined.output, expected, atol=1e-5, rtol=1e-5)
    every = torch.logsumexp(torch.stack([part.lse for part in parts]), 0)
    torch.testing.assert_close(joined.lse, every, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 600])
def test_causal_part(tokens):
    torch.manual_seed(tokens)
    query, key, value = torch.randn(4, tokens, 16), torch.randn(2, tokens, 16), torch.randn(2, tokens, 16)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    expected = whole(query, key, value, 0.25, mask)
    torch.testing.assert_close(
        attend_part(query, key, value, 0.25, causal=True).output, expected, atol=1e-5, rtol=1e-5
    )
    blocks, _ = attention._attend_in_blocks(
        query, key.repeat_interleave(2, 0), value.repeat_interleave(2, 0), 0.25, True
    )
    torch.testing.assert_close(blocks, expected, atol=1e-5, rtol=1e-5)


def test_slots_that_are_not_visible_weigh_nothing():
    torch.manual_seed(1)
    query, key, value = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    visible = torch.ones(2, 2, 9, dtype=torch.bool)
    visible[0, :, 7:] = False
    output = attend_slots(query, key, value, 0.25, visible)
    torch.testing.assert_close(output[0], whole(query[0], key[0, :, :7], value[0, :, :7], 0.25))
    torch.testing.assert_close(output[1], whole(query[1], key[1], value[1], 0.25))
