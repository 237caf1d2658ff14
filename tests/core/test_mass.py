"""Scores of 16-bit queries bound the true products, whatever the keys and queries are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hillinfer_core import kernel, mass, reference
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Precision, Reduction

DIM = 16


def true_products(query, keys):
    """float64 [rows, n]: every query with the keys [H, n, D] of its KV head."""
    group = len(query) // len(keys)
    return np.einsum(
        "rd,rnd->rn", query.astype(np.float64), np.repeat(keys, group, axis=0).astype(np.float64)
    )


def stored(keys, dtype):
    """Rows [H, n, 2, D] of ``keys`` in ``dtype``, and the float32 numbers that they hold."""
    if dtype == "bfloat16":
        bits = (np.ascontiguousarray(keys).view(np.uint32) >> 16).astype(np.uint16)
        rows = np.stack((bits, bits), axis=2)
    else:
        half = keys.astype(dtype)
        rows = np.stack((half, half), axis=2)
    return np.ascontiguousarray(rows), reference.widen_keys(rows)


@st.composite
def inputs(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    heads, group, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    widest = 3.0 if dtype == "float16" else 15.0
    magnitudes = 10.0 ** rng.uniform(-widest, widest, DIM)
    keys = rng.standard_normal((heads, tokens, DIM)) * magnitudes + rng.standard_normal(DIM) * magnitudes
    keys[..., rng.random(DIM) < 0.2] = rng.standard_normal()  # constant channels
    query = rng.standard_normal((heads * group, DIM)) / magnitudes * 10.0 ** rng.uniform(-3, 3)
    if group > 1 and draw(st.booleans()):
        query[1] = -query[0]  # what a sum over the group would hide
    if draw(st.booleans()):
        query[0] = 0
    keys = np.clip(keys, -60000, 60000) if dtype == "float16" else keys
    return (*stored(keys.astype(np.float32), dtype), query.astype(np.float32))


@settings(max_examples=150, deadline=None)
@given(inputs(), st.sampled_from(Precision))
def test_every_product_lies_within_the_error_of_its_score(made, precision):
    rows, keys, query = made
    ranges = kernel.fit_ranges(keys, precision)
    tiles, clipped, _ = kernel.quantise_keys(rows, ranges, precision)
    assert clipped == 0
    assert not mass.clipped_tokens(rows, ranges, precision).any()
    q, scale = mass.wide_query(query, ranges, precision)
    tokens = keys.shape[1]
    ranked = kernel.rank([tiles], q, precision, 0, tokens, tokens, histogram=True)
    middle = scale.sigma[:, None] * ranked.scores + scale.offset[:, None]
    assert (np.abs(true_products(query, keys) - middle) <= scale.error[:, None]).all()

    # The bins say the same of every score.
    bins = (ranked.scores - scale.low[:, None]) // scale.width[:, None]
    for row, counts in enumerate(ranked.histogram):
        np.testing.assert_array_equal(counts, np.bincount(bins[row].astype(int), minlength=2048))
    assert (ranked.scores <= scale.ceiling[:, None]).all()


@settings(max_examples=50, deadline=None)
@given(inputs(), st.data())
def test_clipped_tokens_are_those_that_the_kernel_counts(made, data):
    rows, keys, _ = made
    precision = data.draw(st.sampled_from(Precision))
    ranges = kernel.fit_ranges(keys[:, : 1 + keys.shape[1] // 2], precision)
    outside = mass.clipped_tokens(rows, ranges, precision)
    for token in range(keys.shape[1]):
        one = np.ascontiguousarray(rows[:, token : token + 1])
        assert (kernel.quantise_keys(one, ranges, precision)[1] > 0) == outside[:, token].any()


def test_the_error_term_is_small_for_int8_and_large_for_int4():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((1, 4096, 64)).astype(np.float32)
    query = rng.standard_normal((4, 64)).astype(np.float32)
    errors = {p: mass.wide_query(query, kernel.fit_ranges(keys, p), p)[1].error / 8 for p in Precision}
    assert errors[Precision.int8].max() < 0.3 < 1 < errors[Precision.int4].min()


def test_queries_that_are_not_finite_or_of_another_shape_are_refused():
    ranges = reference.Ranges(np.ones((2, 8), np.float32), np.zeros((2, 8), np.float32))
    for query in (np.full((2, 8), np.nan), np.ones((3, 8)), np.ones((2, 16)), np.ones((0, 8)), np.ones(8)):
        with pytest.raises(InvalidInput):
            mass.wide_query(query.astype(np.float32), ranges, Precision.int8)
    with pytest.raises(InvalidInput, match="wide_query"):
        kernel.quantise_query(np.ones((2, 8), np.float32), ranges, Reduction.none)
