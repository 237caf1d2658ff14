"""The native kernel against its numpy definition, bit for bit, and the definition against plain facts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hillinfer_core import kernel, reference
from hillinfer_core.errors import ConfigError, InvalidInput
from hillinfer_core.layout import Precision, Reduction, tile_bytes
from hillinfer_core.reference import Ranges

DIMS = [8, 64, 80, 96, 128, 256]
STORAGES = [np.float16, np.uint16, np.float32]
seeds = st.integers(0, 2**32 - 1)


def to_storage(values, storage):
    values = values.astype(np.float32)
    return (
        (values.view(np.uint32) >> 16).astype(np.uint16) if storage is np.uint16 else values.astype(storage)
    )


def random_rows(rng, heads, tokens, dim, storage):
    spread = np.exp(rng.normal(size=(heads, 1, 1, dim)) * 2)
    return to_storage(rng.normal(size=(heads, tokens, 2, dim)) * spread + rng.normal(size=dim), storage)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, tokens=st.integers(1, 70), dim=st.sampled_from(DIMS), storage=st.sampled_from(STORAGES),
       precision=st.sampled_from(Precision))  # fmt: skip
def test_quantised_keys_are_bit_exact(seed, tokens, dim, storage, precision):
    rng = np.random.default_rng(seed)
    fitted = random_rows(rng, 2, 40, dim, storage)
    keys = kernel.widen_keys(fitted)
    np.testing.assert_array_equal(keys, reference.widen_keys(fitted))
    ranges = kernel.fit_ranges(keys, precision)
    rows = random_rows(rng, 2, tokens, dim, storage)  # another sample: some of it is clipped
    expected, clipped, nonfinite = reference.quantise_keys(rows, ranges, precision)
    tiles, *counts = kernel.quantise_keys(rows, ranges, precision)
    np.testing.assert_array_equal(tiles, expected)
    assert counts == [clipped, nonfinite]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("precision", Precision)
def test_every_bit_pattern_of_keys_quantises_alike(storage, precision):
    if storage is np.float32:
        patterns = (np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    else:
        patterns = np.arange(1 << 16, dtype=np.uint16).view(storage)
    rows = np.repeat(patterns.reshape(1, -1, 1, 64), 2, axis=2)
    for scale, zero in ((1.0, 0.0), (0.1, -3.7), (1e-38, 0.0), (3e36, -3e38)):
        ranges = Ranges(np.full((1, 64), scale, np.float32), np.full((1, 64), zero, np.float32))
        expected, clipped, nonfinite = reference.quantise_keys(rows, ranges, precision)
        tiles, *counts = kernel.quantise_keys(rows, ranges, precision)
        np.testing.assert_array_equal(tiles, expected)
        assert counts == [clipped, nonfinite]
        assert nonfinite > 0


@pytest.mark.parametrize("implementation", [reference, kernel])
def test_halves_round_to_even_and_clipping_is_counted(implementation):
    rows = np.zeros((1, 1, 2, 8), np.float32)
    rows[0, 0, 0] = [-0.5, 0.5, 1.5, 2.5, 14.5, 15.5, -0.6, 15.4]
    ranges = Ranges(np.ones((1, 8), np.float32), np.zeros((1, 8), np.float32))
    tiles, clipped, nonfinite = implementation.quantise_keys(rows, ranges, Precision.int4)
    assert reference.from_tiles(tiles, Precision.int4)[0, 0].tolist() == [0, 0, 2, 2, 14, 15, 0, 15]
    assert (clipped, nonfinite) == (2, 0)
    assert not reference.from_tiles(tiles, Precision.int4)[0, 1:].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("storage", STORAGES)
def test_nonfinite_keys_and_values_are_counted(value, storage):
    values = np.zeros((2, 16, 2, 8))
    values[1, 3, 0, 5] = values[0, 2, 1, 1] = value
    ranges = Ranges(np.ones((2, 8), np.float32), np.zeros((2, 8), np.float32))
    with np.errstate(invalid="ignore"):
        rows = to_storage(values, storage)
    assert kernel.quantise_keys(rows, ranges, Precision.int8)[2] == 2


@pytest.mark.parametrize("precision", Precision)
def test_keys_come_back_within_half_a_level(precision):
    rng = np.random.default_rng(1)
    rows = random_rows(rng, 3, 64, 64, np.float32)
    keys = kernel.widen_keys(rows)
    ranges = kernel.fit_ranges(keys, precision)
    tiles, clipped, _ = kernel.quantise_keys(rows, ranges, precision)
    back = reference.from_tiles(tiles, precision) * ranges.scale[:, None] + ranges.zero[:, None]
    assert clipped == 0
    assert (np.abs(back - keys) <= ranges.scale[:, None] * 0.501).all()


def test_ranges_of_constant_tiny_and_huge_channels_are_usable():
    keys = np.zeros((1, 2, 8), np.float32)
    keys[0, :, 0] = 5.0
    keys[0, 1, 1] = 1e-41
    keys[0, :, 2] = [-3e38, 3e38]
    ranges = kernel.fit_ranges(keys, Precision.int8)
    assert ranges.scale[0, :2].tolist() == [1.0, 1.0]
    assert ranges.zero[0, 0] == 5.0
    assert np.isfinite(ranges.scale).all()
    with pytest.raises(InvalidInput, match="NaN"):
        kernel.fit_ranges(np.full((1, 1, 8), np.nan, np.float32), Precision.int8)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, dim=st.sampled_from(DIMS), group=st.integers(1, 8),
       reduction=st.sampled_from([Reduction.sum, Reduction.max]))  # fmt: skip
def test_quantised_query_follows_its_definition(seed, dim, group, reduction):
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=(3, dim))).astype(np.float32)
    query = rng.normal(size=(3 * group, dim)).astype(np.float32)
    zero = rng.normal(size=(3, dim)).astype(np.float32)
    q, offsets, sigma = kernel.quantise_query(query, Ranges(scale, zero), reduction)
    scaled = query.reshape(3, group, dim) * scale[:, None]
    if reduction is Reduction.sum:
        scaled = scaled.astype(np.float64).sum(axis=1, keepdims=True)
    assert q.shape == scaled.shape
    assert sigma.dtype == np.float32
    assert (np.abs(q).max(axis=(1, 2)) == 127).all()
    assert (np.abs(q * sigma[:, None, None] - scaled) <= sigma[:, None, None] * 0.51).all()
    assert offsets.dtype == np.int32
    assert offsets.max(axis=1).tolist() == [0, 0, 0]
    if reduction is Reduction.max:
        shared = np.einsum("hgd,hd->hg", query.reshape(3, group, dim).astype(np.float64), zero)
        behind = shared - shared.max(axis=1, keepdims=True)
        assert (np.abs(offsets * sigma[:, None] - behind) <= sigma[:, None] * 0.51).all()


@settings(deadline=None, max_examples=150)
@given(seed=seeds, dim=st.sampled_from(DIMS), group=st.integers(1, 9), power=st.integers(-44, 36),
       reduction=st.sampled_from([Reduction.sum, Reduction.max]))  # fmt: skip
def test_quantised_queries_are_bit_exact(seed, dim, group, power, reduction):
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", under="ignore"):
        scale = np.exp(rng.normal(size=(3, dim)) * 3).astype(np.float32)
        query = (rng.normal(size=(3 * group, dim)) * 10.0**power).astype(np.float32)
        # Levels that lie half way between two numbers.
        query[:group] = rng.integers(-254, 255, (group, dim)) / 2 * scale[0].max()
    scale[0] = 1
    if rng.random() < 0.2:
        query[rng.integers(3 * group), rng.integers(dim)] = rng.choice([np.nan, np.inf, -np.inf, 3e38])
    zero = (rng.normal(size=(3, dim)) * np.exp(rng.normal() * 9)).astype(np.float32)
    try:
        expected = reference.quantise_query(query, Ranges(scale, zero), reduction)
    except InvalidInput as error:
        with pytest.raises(InvalidInput, match=str(error)[:20]):
            kernel.quantise_query(query, Ranges(scale, zero), reduction)
        return
    for mine, right in zip(
        kernel.quantise_query(query, Ranges(scale, zero), reduction), expected, strict=True
    ):
        assert mine.dtype == right.dtype
        np.testing.assert_array_equal(mine, right)


def test_an_offset_adds_in_ascending_order_and_is_cut_off_where_it_no_longer_counts():
    zero = np.zeros((1, 8), np.float32)
    zero[0, :3] = 2.0**60, 1.0, -(2.0**60)
    query = np.ones((2, 8), np.float32)
    query[1, :3] = 0
    ranges = Ranges(np.full((1, 8), 127, np.float32), zero)  # sigma is 1
    # 2**60 + 1 is 2**60 in float64: in this order the sum is 0, and 1 in others.
    assert kernel.quantise_query(query, ranges, Reduction.max)[1].tolist() == [[0, 0]]
    zero[0, 2] = 0
    assert kernel.quantise_query(query, ranges, Reduction.max)[1].tolist() == [[0, reference.LEAST_OFFSET]]


@pytest.mark.parametrize("precision", Precision)
def test_the_maximum_is_that_of_the_true_products(precision):
    rng = np.random.default_rng(11)
    keys = (rng.normal(size=(2, 320, 64)) + 4 * rng.normal(size=(2, 1, 64))).astype(np.float32)
    ranges = kernel.fit_ranges(keys, precision)
    rows = np.stack((keys, keys), axis=2)
    tiles, _, _ = kernel.quantise_keys(rows, ranges, precision)
    query = rng.normal(size=(8, 64)).astype(np.float32)
    q, offsets, sigma = kernel.quantise_query(query, ranges, Reduction.max)
    found = np.empty((2, 320), np.int32)
    kernel.scores(tiles, q, precision, found, offsets=offsets)
    levels = reference.from_tiles(tiles, precision)
    held = levels.astype(np.float64) * ranges.scale[:, None] + ranges.zero[:, None]
    products = np.einsum("hgd,hnd->hng", query.reshape(2, 4, 64).astype(np.float64), held)
    shared = np.einsum("hgd,hd->hg", query.reshape(2, 4, 64).astype(np.float64), ranges.zero)
    true = products.max(axis=2) - shared.max(axis=1)[:, None]
    # The query's rounding makes at most half a level for each dimension, the offset's half a score.
    assert (np.abs(found * sigma[:, None] - true) <= sigma[:, None] * (0.5 * 64 * precision.levels + 1)).all()
    # A maximum without them is another one.
    bare = np.empty_like(found)
    kernel.scores(tiles, q, precision, bare)
    k = 16
    best = [set(np.argsort(-each)[:k]) for each in true]
    right, wrong = (
        np.mean([len(best[head] & set(np.argsort(-each[head])[:k])) / k for head in range(2)])
        for each in (found, bare)
    )
    assert right > 0.8 > wrong


def test_queries_of_zeros_and_of_nothing_finite():
    ranges = Ranges(np.ones((2, 8), np.float32), np.zeros((2, 8), np.float32))
    q, offsets, sigma = kernel.quantise_query(np.zeros((4, 8), np.float32), ranges, Reduction.max)
    assert not q.any()
    assert not offsets.any()
    assert sigma.tolist() == [1.0, 1.0]
    for bad in (np.nan, np.inf):
        with pytest.raises(InvalidInput, match="query"):
            kernel.quantise_query(np.full((2, 8), bad, np.float32), ranges, Reduction.sum)
    for shape in ((3, 8), (2, 16), (0, 8), (8,)):
        with pytest.raises(InvalidInput, match="query"):
            kernel.quantise_query(np.zeros(shape, np.float32), ranges, Reduction.sum)


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("group", range(1, 10))
def test_scores_are_bit_exact(variant, precision, dim, group):
    rng = np.random.default_rng(dim * 16 + group)
    for count in (1, 3, 4, 9):
        tiles = rng.integers(0, 256, (2, count, tile_bytes(dim, precision)), np.uint8)
        q = rng.integers(-127, 128, (2, group, dim)).astype(np.int8)
        expected = np.full((2, count * 16 + 5), -1, np.int32)
        found = expected.copy()
        offsets = rng.integers(-100_000, 1, (2, group)).astype(np.int32)
        reference.scores(tiles, q, precision, expected, offsets=offsets)
        kernel.scores(tiles, q, precision, found, offsets=offsets)
        np.testing.assert_array_equal(found, expected)
        assert (found[:, count * 16 :] == -1).all()


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("sign", [-127, 127])
def test_scores_of_extreme_values_do_not_saturate(variant, precision, dim, sign):
    tiles = np.full((1, 5, tile_bytes(dim, precision)), 255, np.uint8)
    out = np.zeros((1, 80), np.int32)
    for group in (1, 2, 5):
        kernel.scores(tiles, np.full((1, group, dim), sign, np.int8), precision, out)
        assert (out == dim * sign * precision.levels).all()


def test_scores_equal_the_dot_product_of_levels(variant):
    rng = np.random.default_rng(7)
    rows = random_rows(rng, 2, 48, 64, np.float16)
    ranges = kernel.fit_ranges(kernel.widen_keys(rows), Precision.int8)
    tiles, _, _ = kernel.quantise_keys(rows, ranges, Precision.int8)
    q, offsets, _ = kernel.quantise_query(rng.normal(size=(8, 64)).astype(np.float32), ranges, Reduction.max)
    out = np.empty((2, 48), np.int32)
    kernel.scores(tiles, q, Precision.int8, out, offsets=offsets)
    levels = reference.from_tiles(tiles, Precision.int8).astype(np.int64)
    for head in range(2):
        assert (out[head] == (levels[head] @ q[head].T.astype(np.int64) + offsets[head]).max(axis=1)).all()


def test_scores_accept_slices_of_larger_arrays(variant):
    rng = np.random.default_rng(3)
    store = rng.integers(0, 256, (2, 10, tile_bytes(64, Precision.int4)), np.uint8)
    q = rng.integers(-127, 128, (2, 1, 64)).astype(np.int8)
    whole, part = np.zeros((2, 160), np.int32), np.zeros((2, 200), np.int32)
    kernel.scores(store, q, Precision.int4, whole)
    kernel.scores(store[:, 2:7], q, Precision.int4, part[:, 40:])
    np.testing.assert_array_equal(part[:, 40:120], whole[:, 32:112])
    assert not part[:, :40].any()
    assert not part[:, 120:].any()


def test_an_unknown_variant_is_refused(monkeypatch):
    monkeypatch.setenv("HILLINFER_KERNEL", "mmx")
    with pytest.raises(ConfigError, match="HILLINFER_KERNEL"):
        kernel.scores(np.zeros((1, 1, 128), np.uint8), np.zeros((1, 1, 8), np.int8), Precision.int8,
                      np.zeros((1, 16), np.int32))  # fmt: skip


def test_scores_refuse_arguments_that_do_not_fit():
    tiles, q, out = np.zeros((1, 2, 128), np.uint8), np.zeros((1, 1, 8), np.int8), np.zeros((1, 32), np.int32)
    kernel.scores(tiles, q, Precision.int8, out)
    read_only = out.copy()
    read_only.flags.writeable = False
    for bad in (
        (tiles.astype(np.int8), q, out),
        (tiles, q.astype(np.int32), out),
        (tiles, np.zeros((1, 1, 16), np.int8), out),
        (tiles, np.zeros((2, 1, 8), np.int8), out),
        (tiles, q, out[:, :31]),
        (tiles, q, np.zeros((1, 64), np.int32)[:, ::2]),
        (tiles, q, read_only),
    ):
        with pytest.raises(InvalidInput):
            kernel.scores(bad[0], bad[1], Precision.int8, bad[2])


@settings(deadline=None, max_examples=200)
@given(seed=seeds, tokens=st.integers(1, 400), spread=st.sampled_from([1, 2, 50, 5000, 2**23, 2**31]),
       data=st.data())  # fmt: skip
def test_top_k_is_exact_with_ties_to_the_lowest_id(seed, tokens, spread, data):
    rng = np.random.default_rng(seed)
    k = data.draw(st.integers(0, tokens + 3))
    scores = rng.integers(-spread, spread, (3, tokens)).astype(np.int32)
    ids, chosen = kernel.top_k(scores, k, 1000)
    expected_ids, expected = reference.top_k(scores, k, 1000)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(chosen, expected)
    for row in range(3):
        plain = sorted(range(tokens), key=lambda i: (-scores[row, i], i))[:k]
        assert ids[row].tolist() == [1000 + i for i in sorted(plain)]


def test_top_k_of_equal_and_of_extreme_scores():
    ids, chosen = kernel.top_k(np.full((2, 100), 7, np.int32), 5, 0)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert (chosen == 7).all()
    limits = np.iinfo(np.int32)
    ids, chosen = kernel.top_k(
        np.array([[limits.min, limits.max, 0, limits.max, -1]], np.int32), 3, 2**32 - 5
    )
    assert ids.tolist() == [[2**32 - 4, 2**32 - 3, 2**32 - 2]]
    assert chosen.tolist() == [[limits.max, 0, limits.max]]
    assert kernel.top_k(np.empty((2, 0), np.int32), 3, 0)[0].shape == (2, 0)
    with pytest.raises(InvalidInput):
        kernel.top_k(np.zeros((1, 2), np.int32), 1, 2**32 - 1)


def test_top_k_over_a_large_skewed_array():
    rng = np.random.default_rng(5)
    scores = (rng.standard_t(2, (2, 50_000)) * 1000).clip(-(2**31), 2**31 - 1).astype(np.int32)
    for k in (1, 1000, 49_999):
        np.testing.assert_array_equal(kernel.top_k(scores, k, 0)[0], reference.top_k(scores, k, 0)[0])


def test_checksums_match_the_published_check_value(variant):
    rows = np.frombuffer(b"123456789" * 5, np.uint8).reshape(5, 9)
    assert kernel.row_checksums(rows).tolist() == [0xE3069283] * 5
    assert reference.row_checksums(rows).tolist() == [0xE3069283] * 5
    assert kernel.row_checksums(np.zeros((1, 32), np.uint8)).tolist() == [0x8A9136AA]  # RFC 3720, B.4


@pytest.mark.parametrize("row_bytes", [1, 7, 32, 512, 2048])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_checksums_match_the_definition(variant, row_bytes, count):
    rows = np.random.default_rng(row_bytes).integers(0, 256, (count, row_bytes), np.uint8)
    np.testing.assert_array_equal(kernel.row_checksums(rows), reference.row_checksums(rows))
