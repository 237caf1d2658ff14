"""A query in native code is what its formula gives in float64, but for rounding."""

import numpy as np
import pytest

from hillinfer_core.errors import InvalidInput
from hillinfer_core.kernel import variants
from hillinfer_core.predict import QueryParts, is_near, make_query


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def parts_of(width, heads, dim, *, bias=False, head_norm=False):
    return QueryParts(
        numbers(width) + 1,
        1e-5,
        numbers(heads * dim, width, seed=1),
        numbers(heads * dim, seed=2) if bias else None,
        numbers(dim, seed=3) + 1 if head_norm else None,
        1e-3,
    )


def normalised(x, factors, epsilon):
    return factors * x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)


def expected(hidden, parts, cosines, sines):
    hidden, cosines, sines = (each.astype(np.float64) for each in (hidden, cosines, sines))
    query = normalised(hidden, parts.norm, parts.epsilon) @ parts.weight.astype(np.float64).T
    query = query if parts.bias is None else query + parts.bias
    query = query.reshape(*hidden.shape[:2], -1, cosines.shape[-1])
    if parts.head_norm is not None:
        query = normalised(query, parts.head_norm, parts.head_epsilon)
    query = query.transpose(0, 2, 1, 3)
    first, second = np.split(query, 2, -1)
    return query * cosines[:, None] + np.concatenate((-second, first), -1) * sines[:, None]


@pytest.mark.parametrize("kind", variants())
@pytest.mark.parametrize("width", [1, 30, 64, 257])
@pytest.mark.parametrize(("heads", "dim"), [(1, 4), (3, 16), (2, 72)])
@pytest.mark.parametrize(("bias", "head_norm"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("batch", "tokens", "rotations"), [(1, 1, 1), (3, 1, 3), (2, 5, 1)])
def test_a_query(monkeypatch, kind, width, heads, dim, bias, head_norm, batch, tokens, rotations):
    monkeypatch.setenv("HILLINFER_KERNEL", kind)
    parts = parts_of(width, heads, dim, bias=bias, head_norm=head_norm)
    hidden = numbers(batch, tokens, width, seed=4) * 30
    cosines, sines = numbers(rotations, tokens, dim, seed=5), numbers(rotations, tokens, dim, seed=6)
    query = make_query(hidden, parts, cosines, sines)
    assert query.dtype == np.float32
    assert query.shape == (batch, heads, tokens, dim)
    assert is_near(query, expected(hidden, parts, cosines, sines).astype(np.float32), 2e-6)


def test_an_input_that_does_not_lie_together_and_one_that_is_not_finite():
    parts, cosines, sines = parts_of(24, 2, 8), numbers(1, 1, 8), numbers(1, 1, 8, seed=1)
    apart = numbers(3, 24, 2).transpose(2, 0, 1)[:, :1]
    assert not apart.flags.c_contiguous
    query = make_query(apart, parts, cosines, sines)
    np.testing.assert_array_equal(query, make_query(apart.copy(), parts, cosines, sines))
    wrong = apart.copy()
    wrong[1, 0, 3] = np.nan
    query = make_query(wrong, parts, cosines, sines)
    assert np.isnan(query[1]).all()
    assert np.isfinite(query[0]).all()


@pytest.mark.parametrize(
    "change",
    [
        {"norm": numbers(23)},
        {"weight": numbers(16, 23)},
        {"weight": numbers(15, 24)},
        {"bias": numbers(8)},
        {"head_norm": numbers(16)},
    ],
)
def test_parts_that_do_not_fit_are_refused(change):
    hidden, turned = numbers(2, 1, 24), numbers(1, 1, 8)
    parts = parts_of(24, 2, 8)
    make_query(hidden, parts, turned, turned)
    with pytest.raises(InvalidInput, match="cannot make a query"):
        make_query(hidden, parts._replace(**change), turned, turned)


@pytest.mark.parametrize("shape", [(3, 1, 8), (1, 2, 8), (1, 1, 6), (1, 1, 0), (1, 1, 5)])
def test_rotations_that_do_not_fit_are_refused(shape):
    turned = numbers(*shape)
    with pytest.raises(InvalidInput, match="cannot make a query"):
        make_query(numbers(2, 1, 24), parts_of(24, 2, 8), turned, turned)
    with pytest.raises(InvalidInput, match="cannot make a query"):
        make_query(numbers(2, 1, 24), parts_of(24, 2, 8), numbers(1, 1, 8), turned)


def test_near_is_measured_for_each_head_apart():
    query = numbers(2, 4, 1, 16)
    query[0, 1] *= 1e-4
    other = query.copy()
    assert is_near(query, other, 0.0)
    other[0, 1, 0, 3] += 1e-6  # nothing beside the other heads
    assert not is_near(query, other, 1e-4)
    assert is_near(query, other, 1e-1)
    assert not is_near(query, query[:1], 1.0)
    for number in (np.nan, np.inf):
        other[1, 2, 0, 5] = number
        assert not is_near(query, other, 1e3)
        assert not is_near(other, query, 1e3)
        assert not is_near(other, other, 1e3)
    assert is_near(np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32), 0.0)
