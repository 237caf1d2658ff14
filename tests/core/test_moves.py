"""Rows moved in native code, against numpy's indexing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hillinfer_core.errors import InvalidInput
from hillinfer_core.moves import exchange_rows, join_rows, put_rows, split_rows
from hillinfer_core.places import exchange

DTYPES = st.sampled_from([np.float16, np.uint16, np.float32])


def numbers(rng, *shape, dtype=np.float32):
    return rng.integers(1, 60000, shape).astype(np.uint16).astype(dtype)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(0, 3), st.integers(1, 20),
    st.sampled_from([1, 8, 100]), DTYPES,
)  # fmt: skip
def test_rows_go_where_numpy_puts_them(seed, heads, pinned, slots, dim, dtype):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, heads * slots + 1))
    keys, values = (numbers(rng, heads, pinned + slots, dim, dtype=dtype) for _ in range(2))
    places = rng.permutation(heads * slots)[:count]
    at = places // slots, pinned + places % slots
    assert np.array_equal(join_rows(keys, values, pinned, places), np.stack([keys[at], values[at]], 1))

    rows = numbers(rng, count + 3, 2, dim, dtype=dtype)
    which = rng.permutation(len(rows))[:count]
    for chosen in (which, None):
        given = rows[:count] if chosen is None else rows
        expected_keys, expected_values = keys.copy(), values.copy()
        picked = given if chosen is None else given[chosen]
        expected_keys[at], expected_values[at] = picked[:, 0], picked[:, 1]
        split_rows(given, chosen, keys, values, pinned, places)
        assert np.array_equal(keys, expected_keys)
        assert np.array_equal(values, expected_values)

    pool = numbers(rng, heads * slots, 2, dim, dtype=dtype)
    expected = pool.copy()
    expected[places] = rows[which]
    put_rows(rows, which, pool, places)
    assert np.array_equal(pool, expected)


@pytest.mark.parametrize("wrong", [-1, 5, 1 << 62, -(1 << 63)])
def test_a_place_that_does_not_exist_is_refused_and_nothing_moves(wrong):
    keys, values = np.ones((1, 7, 8), np.float16), np.ones((1, 7, 8), np.float16)
    rows, pool = np.zeros((4, 2, 8), np.float16), np.ones((5, 2, 8), np.float16)
    good, bad = np.array([0, 1]), np.array([0, wrong])
    for move in (
        lambda: join_rows(keys, values, 2, bad),
        lambda: join_rows(keys, values, 8, good),
        lambda: split_rows(rows[:2], None, keys, values, 2, bad),
        lambda: split_rows(rows, bad, keys, values, 2, good),
        lambda: put_rows(rows, good, pool, bad),
        lambda: put_rows(rows, bad, pool, good),
    ):
        with pytest.raises(InvalidInput, match="does not exist"):
            move()
    assert all((array == 1).all() for array in (keys, values, pool))


def test_arrays_that_do_not_fit_are_refused():
    keys, rows, pool = (np.zeros(shape, np.float16) for shape in ((2, 5, 8), (4, 2, 8), (5, 2, 8)))
    two = np.array([0, 1])
    for move in (
        lambda: join_rows(keys, keys[:1], 0, two),
        lambda: join_rows(keys, keys.astype(np.float32), 0, two),
        lambda: join_rows(keys[:, ::2], keys[:, ::2], 0, two),
        lambda: split_rows(rows, None, keys, keys, 0, two),
        lambda: split_rows(rows[:2, :, :4], None, keys, keys, 0, two),
        lambda: split_rows(rows[:2], None, keys, keys[:1], 0, two),
        lambda: split_rows(rows[:2].astype(np.float32), None, keys, keys, 0, two),
        lambda: put_rows(rows, two, pool, two[:1]),
        lambda: put_rows(rows, two, pool[:, :, :4], two),
        lambda: put_rows(rows, two, pool.astype(np.float32), two),
        lambda: moved(keys=keys[:1]),
        lambda: moved(values=keys[:, :4].copy()),
        lambda: moved(pinned=2),
        lambda: moved(hot_rows=rows[:3]),
        lambda: moved(hot_rows=rows[:, :, :4].copy()),
        lambda: moved(hot_rows=rows.astype(np.float32)),
        lambda: moved(hot=np.zeros((1, 4), np.uint32)),
    ):
        with pytest.raises(InvalidInput, match=r"do not fit|KV heads"):
            move()
    assert not moved(tokens=9).missing_counts.any()
    with pytest.raises(InvalidInput, match="token 8 is wanted"):
        moved(tokens=8)


def moved(tokens=9, **others):
    """Of two KV heads, one pinned slot and four others, and two places in the hot pool of each."""
    ids = np.array([[5, 6, 7, 8]] * 2, np.uint32)
    keys, rows = np.zeros((2, 5, 8), np.float16), np.zeros((4, 2, 8), np.float16)
    arrays = {"hot": np.zeros((2, 2), np.uint32), "keys": keys, "values": keys, "pinned": 1, "hot_rows": rows}
    wanted = np.array([6, 8, 8], np.uint32)
    given = {"slots": ids, "wanted": wanted, "counts": np.array([2, 1]), "tokens": tokens}
    return exchange_rows(**given, **(arrays | others))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(0, 3), st.integers(0, 6), DTYPES)
def test_rows_move_as_ids_are_exchanged(seed, heads, pinned, hot_count, dtype):
    """The same as `exchange`, and then rows by its places."""
    rng, slot_count, tokens, dim = np.random.default_rng(seed), 5, 20, 4
    keys, values = (numbers(rng, heads, pinned + slot_count, dim, dtype=dtype) for _ in range(2))
    rows = numbers(rng, heads * hot_count, 2, dim, dtype=dtype)
    both = np.stack([rng.permutation(tokens)[: slot_count + hot_count] for _ in range(heads)])
    both = np.where(rng.random(both.shape) < 0.2, 0xFFFFFFFF, both).astype(np.uint32)
    slots, hot = both[:, :slot_count].copy(), both[:, slot_count:].copy()
    counts = rng.integers(0, slot_count + 1, heads)
    wanted = np.concatenate([np.sort(rng.permutation(tokens)[:count]) for count in counts]).astype(np.uint32)
    other_slots, other_hot, before = slots.copy(), hot.copy(), (keys.copy(), values.copy())
    expected = exchange(other_slots, other_hot, wanted, counts, tokens)
    done = exchange_rows(slots, hot, wanted, counts, tokens, keys, values, pinned, rows)
    assert np.array_equal(slots, other_slots)
    assert np.array_equal(hot, other_hot)
    for mine, theirs in zip(done[:3], expected[:3], strict=True):
        assert np.array_equal(mine, theirs)
    if hot_count:
        assert np.array_equal(done.left_ids, expected.left_ids)
        assert np.array_equal(done.left_counts, expected.left_counts)
        assert np.array_equal(done.left_rows, join_rows(*before, pinned, expected.left_places))
    else:
        assert not len(done.left_ids)
        assert not len(done.left_rows)
    split_rows(rows, expected.hot_places, *before, pinned, expected.hot_slots)
    assert np.array_equal(keys, before[0])
    assert np.array_equal(values, before[1])
