"""Rows moved in native code, against numpy's indexing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hillinfer_core.errors import InvalidInput
from hillinfer_core.moves import join_rows, put_rows, split_rows

DTYPES = st.sampled_from([np.float16, np.uint16, np.float32])


def numbers(rng, *shape, dtype=np.float32):
    return rng.integers(1, 60000, shape).astype(np.uint16).astype(dtype)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 30), st.sampled_from([1, 8, 100]), DTYPES
)
def test_rows_go_where_numpy_puts_them(seed, count, slots, dim, dtype):
    rng = np.random.default_rng(seed)
    count = min(count, slots)
    keys, values = (numbers(rng, slots, dim, dtype=dtype) for _ in range(2))
    places = rng.permutation(slots)[:count]
    assert np.array_equal(join_rows(keys, values, places), np.stack([keys[places], values[places]], 1))

    rows = numbers(rng, count + 3, 2, dim, dtype=dtype)
    which = rng.permutation(len(rows))[:count]
    for chosen in (which, None):
        given = rows[:count] if chosen is None else rows
        expected_keys, expected_values = keys.copy(), values.copy()
        picked = given if chosen is None else given[chosen]
        expected_keys[places], expected_values[places] = picked[:, 0], picked[:, 1]
        split_rows(given, chosen, keys, values, places)
        assert np.array_equal(keys, expected_keys)
        assert np.array_equal(values, expected_values)

    pool = numbers(rng, slots, 2, dim, dtype=dtype)
    expected = pool.copy()
    expected[places] = rows[which]
    put_rows(rows, which, pool, places)
    assert np.array_equal(pool, expected)


@pytest.mark.parametrize("wrong", [-1, 5, 1 << 62, -(1 << 63)])
def test_a_place_that_does_not_exist_is_refused_and_nothing_moves(wrong):
    keys, values = np.ones((5, 8), np.float16), np.ones((5, 8), np.float16)
    rows, pool = np.zeros((4, 2, 8), np.float16), np.ones((5, 2, 8), np.float16)
    good, bad = np.array([0, 1]), np.array([0, wrong])
    for move in (
        lambda: join_rows(keys, values, bad),
        lambda: split_rows(rows[:2], None, keys, values, bad),
        lambda: split_rows(rows, bad, keys, values, good),
        lambda: put_rows(rows, good, pool, bad),
        lambda: put_rows(rows, bad, pool, good),
    ):
        with pytest.raises(InvalidInput, match="does not exist"):
            move()
    assert all((array == 1).all() for array in (keys, values, pool))


def test_arrays_that_do_not_fit_are_refused():
    keys, rows, pool = (np.zeros(shape, np.float16) for shape in ((5, 8), (4, 2, 8), (5, 2, 8)))
    two = np.array([0, 1])
    for move in (
        lambda: join_rows(keys, keys[:4], two),
        lambda: join_rows(keys, keys.astype(np.float32), two),
        lambda: join_rows(keys[::2], keys[::2], two),
        lambda: split_rows(rows, None, keys, keys, two),
        lambda: split_rows(rows[:2, :, :4], None, keys, keys, two),
        lambda: split_rows(rows[:2], None, keys, keys[:4], two),
        lambda: split_rows(rows[:2].astype(np.float32), None, keys, keys, two),
        lambda: put_rows(rows, two, pool, two[:1]),
        lambda: put_rows(rows, two, pool[:, :, :4], two),
        lambda: put_rows(rows, two, pool.astype(np.float32), two),
    ):
        with pytest.raises(InvalidInput, match="do not fit"):
            move()
