"""Attention in parts equals attention at once."""

from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hillinfer.hkm import attention
from hillinfer.hkm.attention import attend_part, attend_slots, attend_stored, merge
from hillinfer.hkm.tensors import to_storage
from hillinfer_core.attend import Attended, attend
from hillinfer_core.errors import InvalidInput
from hillinfer_core.kernel import variants


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


@pytest.mark.parametrize("kind", variants())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [8, 64, 72, 256])
@pytest.mark.parametrize(("group", "tokens"), [(1, 1), (3, 17), (4, 64), (7, 330)])
def test_attention_in_one_thread(monkeypatch, kind, dtype, dim, group, tokens):
    monkeypatch.setenv("HILLINFER_KERNEL", kind)
    torch.manual_seed(tokens)
    query = torch.randn(2, 2 * group, 1, dim).to(dtype)
    key, value = (torch.randn(2, 2, tokens, dim).to(dtype) for _ in range(2))
    attended = Attended.of(*(to_storage(each.flatten(0, 1)) for each in (key, value)))
    output = attend_stored(query, attended, dim**-0.5)
    assert output.shape == query.shape
    assert output.dtype == dtype
    folded, keys, values = (each.double().reshape(4, -1, dim) for each in (query, key, value))
    expected = torch.softmax(folded @ keys.transpose(-1, -2) * dim**-0.5, -1) @ values
    # Rounded once, from float32.
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        output.double(), expected.reshape(query.shape), atol=max(3e-6, rounding), rtol=rounding
    )


def test_attention_in_one_thread_to_a_query_that_lies_in_pieces():
    """Of several sequences with one KV head, cut out of what one projection makes of all."""
    torch.manual_seed(1)
    made = torch.randn(2, 1, 6 * 16)
    query = made[..., : 4 * 16].view(2, 1, 4, 16).transpose(1, 2)
    keys, values = torch.randn(2, 2, 1, 30, 16)
    got = attend_stored(
        query, Attended.of(*(to_storage(each).reshape(2, 30, 16) for each in (keys, values))), 0.3
    )
    torch.testing.assert_close(got, attend_slots(query, keys, values, 0.3, None), atol=1e-5, rtol=1e-5)


def test_attention_in_one_thread_is_as_sharp_as_its_scores():
    """Scores far apart, as softmax without an overflow has them, and numbers that are not finite."""
    query = torch.ones(1, 2, 1, 16)
    key = torch.linspace(-40, 40, 50)[None, None, :, None].expand(1, 1, 50, 16).contiguous()
    value = torch.randn(1, 1, 50, 16)
    for scaling in (1e-3, 1.0, 1e3):
        output = attend_stored(query, Attended.of(key[0].numpy(), value[0].numpy()), scaling)
        expected = attend_slots(query, key, value, scaling, None)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    key[0, 0, 3] = torch.nan
    assert attend_stored(query, Attended.of(key[0].numpy(), value[0].numpy()), 1.0).isnan().all()


def test_arrays_that_do_not_fit_are_not_attended_to():
    query, keys = np.zeros((2, 3, 8), np.float32), np.zeros((2, 5, 8), np.float32)
    for asked, *wrong in (
        (query[:1], keys, keys),
        (query, keys, keys[:, :4].copy()),
        (query, keys.astype(np.float16), keys),
        (query, keys[:, ::2], keys[:, ::2]),
        (query, keys.astype(np.float64), keys.astype(np.float64)),
        (query, keys[:, :0], keys[:, :0]),
    ):
        with pytest.raises(InvalidInput, match="cannot attend"):
            attend(asked, Attended.of(*wrong), 1.0)
