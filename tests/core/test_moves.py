"""Rows moved in native code, against numpy's indexing."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hillinfer_core.errors import InvalidInput
from hillinfer_core.moves import HotArrays, SlotArrays, join_rows, put_rows, put_tokens, split_rows, turn_over
from hillinfer_core.places import count_hits, exchange, keep

DTYPES = st.sampled_from([np.float16, np.uint16, np.float32])


def numbers(rng, *shape, dtype=np.float32):
    return rng.integers(1, 60000, shape).astype(np.uint16).astype(dtype)


@pytest.fixture(params=["1", "8"])
def threads(request, monkeypatch):
    """Also by several threads, and those for little."""
    monkeypatch.setenv("HILLINFER_KERNEL_THREADS", request.param)
    if request.param != "1":
        monkeypatch.setattr("hillinfer_core.moves._THREAD_BYTES", 1)


@pytest.mark.usefixtures("threads")
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(0, 3), st.integers(1, 20),
    st.sampled_from([1, 8, 100, 20_000]), DTYPES,
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
    for chosen in (None, which):
        moved = rows[:count] if chosen is None else rows[chosen]
        expected_keys, expected_values = keys.copy(), values.copy()
        expected_keys[at], expected_values[at] = moved[:, 0], moved[:, 1]
        split_rows(rows[:count] if chosen is None else rows, keys, values, pinned, places, chosen)
        assert np.array_equal(keys, expected_keys)
        assert np.array_equal(values, expected_values)

    for chosen, to in ((which, places), (None, places), (which, None), (None, None)):
        pool = numbers(rng, heads * slots, 2, dim, dtype=dtype)
        expected = pool.copy()
        expected[slice(count) if to is None else to] = rows[:count] if chosen is None else rows[chosen]
        put_rows(rows[:count] if chosen is None else rows, chosen, pool, to)
        assert np.array_equal(pool, expected)


@pytest.mark.parametrize("wrong", [-1, 5, 1 << 62, -(1 << 63)])
def test_a_place_that_does_not_exist_is_refused_and_nothing_moves(wrong):
    keys, values = np.ones((1, 7, 8), np.float16), np.ones((1, 7, 8), np.float16)
    rows, pool = np.zeros((4, 2, 8), np.float16), np.ones((5, 2, 8), np.float16)
    good, bad = np.array([0, 1]), np.array([0, wrong])
    for move in (
        lambda: join_rows(keys, values, 2, bad),
        lambda: join_rows(keys, values, 8, good),
        lambda: split_rows(rows[:2], keys, values, 2, bad),
        lambda: put_rows(rows, good, pool, bad),
        lambda: put_rows(rows, bad, pool, good),
        lambda: put_rows(rows, np.array([0, 1, 2, 3, 0, 1]), pool, None),
        lambda: split_rows(rows, keys, values, 2, good, bad),
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
        lambda: split_rows(rows, keys, keys, 0, two),
        lambda: split_rows(rows[:2, :, :4], keys, keys, 0, two),
        lambda: split_rows(rows[:2], keys, keys[:1], 0, two),
        lambda: split_rows(rows[:2].astype(np.float32), keys, keys, 0, two),
        lambda: put_rows(rows, two, pool, two[:1]),
        lambda: put_rows(rows, two, pool[:, :, :4], two),
        lambda: put_rows(rows, two, pool.astype(np.float32), two),
        lambda: turned(values=keys.astype(np.float32)),
        lambda: turned(keys=keys[:1]),
        lambda: turned(values=keys[:, :4].copy()),
        lambda: turned(pinned=2),
        lambda: turned(hot_rows=rows[:3]),
        lambda: turned(hot_rows=rows[:, :, :4].copy()),
        lambda: turned(hot=np.zeros((1, 4), np.uint32)),
        lambda: turned(hits=np.zeros((2, 8), np.uint16)),
        lambda: turned(hits=np.zeros((1, 9), np.uint16)),
        lambda: turned(rows=rows.astype(np.float32)),
        lambda: turned(rows=rows[:, :, :4].copy()),
        lambda: turned(missing=[1]),
        lambda: turned(wanted=np.array([[6, 8]], np.uint32)),
        lambda: turned(wanted=np.arange(10, dtype=np.uint32).reshape(2, 5)),
    ):
        with pytest.raises(InvalidInput, match=r"do not fit|KV heads"):
            move()
    assert turned()
    with pytest.raises(InvalidInput, match="token 9 is wanted of a context of 8"):
        turned(tokens=8)


@pytest.mark.parametrize(
    "others",
    [
        {"missing": [1, 0]},
        {"missing": [0, 2], "rows": np.zeros((2, 2, 8), np.float16)},
        {"rows": np.zeros((0, 2, 8), np.float16), "missing": [0, 0]},
        {"wanted": np.array([[8, 6], [6, 9]], np.uint32)},
        {"wanted": np.array([[6, 8], [9, 9]], np.uint32)},
    ],
)
def test_a_selection_that_others_are_missing_of_than_was_told_is_not_taken(others):
    assert not turned(**others)


def turned(tokens=10, **others):
    """Of two KV heads, one pinned slot and four others, and two places in the hot pool of each."""
    keys, rows = np.zeros((2, 5, 8), np.float16), np.zeros((4, 2, 8), np.float16)
    given = {
        "ids": np.array([[5, 6, 7, 8]] * 2, np.uint32), "keys": keys, "values": keys, "pinned": 1,
        "hot": np.array([[0, 1]] * 2, np.uint32), "hits": np.zeros((2, 10), np.uint16), "hot_rows": rows,
        "wanted": np.array([[6, 8], [6, 9]], np.uint32), "missing": [0, 1], "rows": rows[:1],
    } | others  # fmt: skip
    slots = SlotArrays.of(given["ids"].copy(), given["keys"], given["values"], given["pinned"])
    hot = HotArrays.of(given["hot"].copy(), given["hits"], given["hot_rows"])
    return turn_over(slots, hot, given["wanted"], tokens, given["missing"], given["rows"], 256, halve=False)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(0, 3), st.integers(0, 6), st.integers(0, 6),
    st.booleans(), DTYPES,
)  # fmt: skip
def test_all_at_once_is_one_after_the_other(seed, heads, pinned, hot_count, count, halve, dtype):
    """Counting, exchanging ids, keeping what was hit more, moving rows: each by the call for it alone."""
    rng, slot_count, tokens, dim, hit = np.random.default_rng(seed), 6, 20, 4, 256
    keys, values = (numbers(rng, heads, pinned + slot_count, dim, dtype=dtype) for _ in range(2))
    hot_rows = numbers(rng, heads * hot_count, 2, dim, dtype=dtype)
    both = np.stack([rng.permutation(tokens)[: slot_count + hot_count] for _ in range(heads)])
    both = np.where(rng.random(both.shape) < 0.2, 0xFFFFFFFF, both).astype(np.uint32)
    ids, hot = both[:, :slot_count].copy(), both[:, slot_count:].copy()
    hits = rng.choice([0, 128, 256, 300, 65400, 65535], (heads, tokens + 3)).astype(np.uint16)
    wanted = np.stack([np.sort(rng.permutation(tokens)[:count]) for _ in range(heads)]).astype(np.uint32)
    mine = [each.copy() for each in (ids, keys, values, hot, hits, hot_rows)]

    counts = np.full(heads, count)
    if hot_count:
        count_hits(hits, wanted.reshape(-1), counts, hit, 65535)
        hits >>= halve
    done = exchange(ids, hot, wanted.reshape(-1), counts, tokens)
    left = join_rows(keys, values, pinned, done.left_places)
    rows = numbers(rng, len(done.missing_ids), 2, dim, dtype=dtype)
    split_rows(hot_rows[done.hot_places], keys, values, pinned, done.hot_slots)
    split_rows(rows, keys, values, pinned, done.missing_places)
    which, places = keep(hot, hits, done.left_ids, done.left_counts)
    put_rows(left, which, hot_rows, places)

    arrays = SlotArrays.of(*mine[:3], pinned), HotArrays.of(*mine[3:])
    assert turn_over(*arrays, wanted, tokens, done.missing_counts.tolist(), rows, hit, halve=halve)
    for one, other in zip(mine, (ids, keys, values, hot, hits, hot_rows), strict=True):
        assert np.array_equal(one, other)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 3), DTYPES)
def test_a_token_of_each_sequence_goes_where_its_place_is(seed, batch, heads, dtype):
    rng = np.random.default_rng(seed)
    keys, values = (numbers(rng, batch, heads, 7, 4, dtype=dtype) for _ in range(2))
    new_keys, new_values = (numbers(rng, batch, heads, 1, 4, dtype=dtype) for _ in range(2))
    # As a projection has them: a token's heads side by side.
    new_values = np.ascontiguousarray(new_values.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    places = rng.integers(0, 7, batch).tolist()
    expected = keys.copy(), values.copy()
    for row, place in enumerate(places):
        expected[0][row, :, place], expected[1][row, :, place] = new_keys[row, :, 0], new_values[row, :, 0]
    put_tokens(keys, values, new_keys, new_values, places)
    assert np.array_equal(keys, expected[0])
    assert np.array_equal(values, expected[1])
    for wrong in ([7] * batch, [0] * (batch + 1)):
        with pytest.raises(InvalidInput, match="do not fit places"):
            put_tokens(keys, values, new_keys, new_values, wrong)
    for wrong in (new_keys[:, :, :, :3], new_keys.astype(np.float64), np.repeat(new_keys, 2, 2)):
        with pytest.raises(InvalidInput, match="do not fit places"):
            put_tokens(keys, values, wrong, new_values, places)
    assert np.array_equal(keys, expected[0])
