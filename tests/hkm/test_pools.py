"""Slots and hot pool against plain models of what they should hold."""

from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hillinfer.hkm.hot_pool import HotPool
from hillinfer.hkm.pools import Pools
from hillinfer.hkm.resident import Division, divide
from hillinfer.hkm.slots import EMPTY, Slots
from hillinfer.hkm.staging import Rows
from hillinfer.hkm.tensors import to_rows, to_storage
from hillinfer_core.errors import InvalidInput, ResidentTooSmall
from hillinfer_core.places import count_hits, exchange, keep

SINKS, RECENT = 2, 5


def kv(start, count):
    """Keys whose every channel is the token's position."""
    positions = torch.arange(start, start + count, dtype=torch.float32)
    return positions[None, :, None].expand(1, count, 4).contiguous()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_pinned_slots_hold_sinks_and_the_recent_window(chunks):
    slots = Slots(1, 1, 4, SINKS, RECENT, torch.zeros(1))
    length = 0
    for count in chunks:
        slots.append(0, kv(length, count), -kv(length, count))
        length += count
        expected = {p for p in range(length) if p < SINKS or p >= length - RECENT}
        keys, values = slots.pinned_part(0)
        assert {int(x) for x in keys[0, :, 0]} == expected
        assert torch.equal(values, -keys)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2**32 - 1)), min_size=1, max_size=12))
def test_selected_tokens_are_in_their_slots(steps):
    """Whatever is selected step after step, every slot holds its own token's row, each token once."""
    slots = Slots(1, 1, 4, SINKS, RECENT, torch.zeros(1))
    slots.append(0, kv(0, SINKS + RECENT), kv(0, SINKS + RECENT))
    for count, seed in steps:
        wanted = np.sort(np.random.default_rng(seed).choice(40, count, replace=False).astype(np.uint32))
        slots.resize(count)
        before = slots.ids[0, 0].copy()
        none = np.zeros((1, 0), np.uint32)
        done = exchange(slots.ids[0], none, wanted, np.array([count]), 40)
        assert done.missing_ids.tolist() == sorted(set(wanted.tolist()) - set(before.tolist()))
        assert set(done.left_ids.tolist()) == set(before.tolist()) - set(wanted.tolist()) - {EMPTY}
        assert (slots.take(0, done.left_places)[:, 0, 0] == done.left_ids).all()
        rows = np.broadcast_to(done.missing_ids[:, None, None], (len(done.missing_ids), 2, 4))
        slots.put(0, done.missing_places, Rows(rows.astype(np.float32)))
        held = slots.ids[0, 0][slots.ids[0, 0] != EMPTY]
        assert sorted(held) == sorted(wanted)
        for at, token in enumerate(slots.ids[0, 0]):
            if token != EMPTY:
                assert slots.keys[0, 0, slots.pinned + at, 0] == float(token)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_hot_pool_returns_only_what_it_was_given(capacity, seeds):
    pool = HotPool(1, 1, 4, np.float32)
    pool.resize(capacity)
    for seed in seeds:
        wanted = np.sort(np.random.default_rng(seed).choice(30, 6, replace=False).astype(np.uint32))
        counts = np.array([6])
        pool.count(0, wanted, counts, 30)
        missing = np.setdiff1d(wanted, pool.ids[0, 0])
        rows = np.broadcast_to(missing[:, None, None].astype(np.float32), (len(missing), 2, 4))
        pool.offer(0, missing, np.array([len(missing)]), rows)
        for place, token in enumerate(pool.ids[0, 0]):
            assert token == EMPTY or (pool.rows[0, 0, place] == token).all()
        held = pool.ids[0, 0][pool.ids[0, 0] != EMPTY]
        assert len(set(held)) == len(held) <= capacity


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 12),
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 2**32 - 1)), min_size=1, max_size=25),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_a_selected_row_is_in_slots_or_in_the_hot_pool_and_never_in_both(capacity, steps, dtype, on_host):
    """Not on the host: as on an accelerator, where ids are exchanged first and tensors moved then."""
    with nullcontext() if on_host else patch.object(Slots, "_on_host", lambda slots: None):
        select_step_after_step(capacity, steps, dtype)


def select_step_after_step(capacity, steps, dtype):
    slots = Slots(1, 1, 4, SINKS, RECENT, torch.zeros(1, dtype=dtype))
    pools = Pools(slots, HotPool(1, 1, 4, to_storage(torch.zeros(1, dtype=dtype)).dtype))
    slots.lengths[0] = 40
    for count, seed in steps:
        wanted = np.sort(np.random.default_rng(seed).choice(40, count, replace=False).astype(np.uint32))
        slots.resize(max(count, slots.selected))
        pools.hot.resize(capacity)
        held = in_slots(slots) | set(hot_tokens(pools.hot))
        missing, counts, places = pools.admit(0, [wanted])
        assert counts == [len(missing)]
        assert set(missing) == set(wanted) - held
        rows = torch.from_numpy(missing.astype(np.float32)).to(dtype)[:, None, None].expand(-1, 2, 4)
        pools.fill(0, places, to_storage(rows.contiguous()))
        pools.settle()
        assert in_slots(slots) == set(wanted)
        assert_visible(slots)
        hot = hot_tokens(pools.hot)
        assert len(hot) == len(set(hot)) <= capacity
        assert not set(hot) & set(wanted)
        # Nobody who was held is forgotten while there is room.
        assert set(hot) | set(wanted) >= held or len(hot) == capacity
        for at, token in enumerate(slots.ids[0, 0]):
            if token != EMPTY:
                assert (slots.keys[0, 0, slots.pinned + at] == float(token)).all()
        for at, token in enumerate(pools.hot.ids[0, 0]):
            if token != EMPTY:
                row = to_rows(pools.hot.rows[0, 0, at], torch.zeros(1, dtype=dtype))
                assert (row == float(token)).all()


def assert_visible(slots):
    """What is visible is what has an id, whatever was noted of it."""
    visible = slots.visible()
    if visible is None:
        assert not (slots.ids == EMPTY).any()
        assert slots.lengths.min() >= slots.pinned
    else:
        assert np.array_equal(visible[..., slots.pinned :].numpy(), slots.ids != EMPTY)


def test_slots_without_a_token_are_not_visible():
    slots = Slots(2, 1, 4, SINKS, RECENT, torch.zeros(1))
    pools = Pools(slots, HotPool(2, 1, 4, np.float32))
    assert_visible(slots)
    slots.lengths[:] = 40
    assert_visible(slots)
    for size, wanted in ((2, [[3, 4], [5, 6]]), (3, [[3, 4, 5], [5, 6, 7]]), (2, [[3], [5, 6]])):
        slots.resize(size)
        assert_visible(slots)
        for row, ids in enumerate(wanted):
            pools.admit(row, [np.array(ids, np.uint32)])
            assert_visible(slots)
    pools.admit(0, np.array([[3, 30]], np.uint32))
    assert slots.visible() is None
    slots.crop(0, 32)
    assert_visible(slots)
    slots.resize(0)
    assert_visible(slots)


def in_slots(slots):
    return set(slots.ids[0, 0][slots.ids[0, 0] != EMPTY])


def hot_tokens(hot):
    return list(hot.ids[0, 0][hot.ids[0, 0] != EMPTY])


def test_hot_pool_does_not_thrash():
    """Tokens selected equally often do not throw each other out."""
    pool = HotPool(1, 1, 4, np.float32)
    pool.resize(2)
    rows = np.zeros((2, 2, 4), np.float32)
    for pair in ([1, 2], [3, 4], [1, 2], [3, 4]):
        ids = np.array(pair, np.uint32)
        pool.count(0, ids, np.array([2]), 8)
        away = ~np.isin(ids, pool.ids[0, 0])
        pool.offer(0, ids[away], np.array([away.sum()]), rows[away])
    assert sorted(pool.ids[0, 0]) == [1, 2]


def test_what_a_given_up_selection_left_is_not_kept_for_later_tokens():
    slots, hot = Slots(1, 1, 4, SINKS, RECENT, torch.zeros(1)), HotPool(1, 1, 4, np.float32)
    slots.append(0, kv(0, 60), kv(0, 60))
    slots.resize(2)
    hot.resize(2)
    pools = Pools(slots, hot)
    for wanted in ([10, 11], [12, 13]):
        missing = pools.admit(0, [np.array(wanted, np.uint32)])
        pools.fill(0, missing.places, np.full((2, 2, 4), 1, np.float32))
    pools.forget()
    pools.settle()
    assert not hot_tokens(hot)


def test_division_of_the_resident_budget():
    assert divide(1000, 400, 200, 50, 10, 4).keep_slots
    assert divide(1000, 400, 200, 50, 10, 4).hot_rows == 10
    assert divide(1000, 900, 200, 50, 10, 4) == Division(keep_slots=False, hot_rows=0)
    assert not divide(1000, 960, 200, 50, 10, 4).fits
    with pytest.raises(ResidentTooSmall, match="raise resident"):
        divide(1000, 1001, 0, 0, 10, 4)


@pytest.mark.parametrize(
    ("ids", "counts"), [([1, 40], [2]), ([1, 2], [3]), ([1, 2], [1]), ([1, 2], [3, -1]), ([1, 2], [2, 0])]
)
def test_hits_of_tokens_or_heads_that_there_are_not_are_refused(ids, counts):
    hits = np.zeros((1, 40), np.uint16)
    with pytest.raises(InvalidInput):
        count_hits(hits, np.array(ids, np.uint32), np.array(counts), 1, 9)
    with pytest.raises(InvalidInput):
        keep(np.zeros((1, 3), np.uint32), hits, np.array([1, 2], np.uint32), np.array([3]))
    assert not hits.any()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=12), st.data())
def test_what_other_rounds_of_a_step_bring_back_or_let_go_again_is_held_once(seeds, data):
    slots = Slots(1, 1, 4, SINKS, RECENT, torch.zeros(1))
    slots.append(0, kv(0, 60), kv(0, 60))
    slots.resize(6)
    hot = HotPool(1, 1, 4, np.float32)
    hot.resize(4)
    pools = Pools(slots, hot)
    rounds = 0
    for seed in seeds:
        rounds += 1
        wanted = np.sort(np.random.default_rng(seed).choice(14, 6, replace=False).astype(np.uint32))
        missing, _, places = pools.admit(0, [wanted])
        rows = np.broadcast_to(missing[:, None, None].astype(np.float32), (len(missing), 2, 4))
        pools.fill(0, places, rows.copy())
        if rounds == 4 or data.draw(st.booleans()):
            rounds = 0
            pools.settle()
            here = hot_tokens(hot)
            assert len(here) == len(set(here))
            assert not set(here) & set(wanted.tolist())
            for place, token in enumerate(hot.ids[0, 0].tolist()):
                assert token == EMPTY or (hot.rows[0, 0, place] == token).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=10), st.integers(0, 5))
def test_all_heads_at_once_are_each_head_alone(seeds, capacity):
    """Three heads of other selections, also of other sizes, against three pools of one head each."""
    heads, dim = 3, 4

    def pools(count):
        slots = Slots(1, count, dim, SINKS, RECENT, torch.zeros(1))
        slots.lengths[0] = 40
        slots.resize(6)
        hot = HotPool(1, count, dim, np.float32)
        hot.resize(capacity)
        return Pools(slots, hot)

    together, alone = pools(heads), [pools(1) for _ in range(heads)]
    for seed in seeds:
        rng = np.random.default_rng(seed)
        wanted = [
            np.sort(rng.choice(16, int(rng.integers(0, 7)), replace=False)).astype(np.uint32)
            for _ in range(heads)
        ]
        missing = together.admit(0, wanted)
        each = [one.admit(0, [ids]) for one, ids in zip(alone, wanted, strict=True)]
        assert missing.counts.tolist() == [len(one.ids) for one in each]
        assert missing.ids.tolist() == [token for one in each for token in one.ids.tolist()]
        together.fill(0, missing.places, rows_of(missing.ids, missing.counts))
        for head, (one, found) in enumerate(zip(alone, each, strict=True)):
            one.fill(0, found.places, rows_of(found.ids, [0] * head + [len(found.ids)]))
        for one in (together, *alone):
            one.settle()
        for head, one in enumerate(alone):
            np.testing.assert_array_equal(together.slots.ids[0, head], one.slots.ids[0, 0])
            np.testing.assert_array_equal(together.hot.ids[0, head], one.hot.ids[0, 0])
            np.testing.assert_array_equal(together.hot.rows[0, head], one.hot.rows[0, 0])
            assert torch.equal(together.slots.keys[0, head], one.slots.keys[0, 0])
            assert torch.equal(together.slots.values[0, head], one.slots.values[0, 0])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40),
    st.integers(0, 8),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_selection_turned_over_at_once_leaves_the_same_to_the_last_bit(seeds, capacity, dtype):
    """As admitted, filled and settled: for sequences of a batch in turn, and selections of changing size."""
    batch, heads, dim = 2, 2, 4
    like = torch.zeros(1, dtype=dtype)
    stored = to_storage(like).dtype

    def pools():
        slots = Slots(batch, heads, dim, SINKS, RECENT, like)
        hot = HotPool(batch, heads, dim, stored)
        hot.resize(capacity)
        return Pools(slots, hot)

    at_once, apart = pools(), pools()
    for number, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        row, size = number % batch, int(rng.integers(1, 9))
        wanted = np.stack([np.sort(rng.permutation(20 + number)[:size]) for _ in range(heads)]).astype(
            np.uint32
        )
        for each in (at_once, apart):
            each.slots.lengths[:] = 20 + number
            each.slots.resize(size)
        missing = apart.admit(row, wanted)
        rows = rng.integers(1, 60000, (len(missing.ids), 2, dim)).astype(np.uint16).astype(stored)
        apart.fill(row, missing.places, rows)
        apart.settle()
        assert at_once.turn_over(row, wanted, missing.counts.tolist(), rows)
        at_once.settle()
        assert at_once.slots.full == apart.slots.full
        assert at_once.slots.nbytes + at_once.hot.nbytes == apart.slots.nbytes + apart.hot.nbytes
        for of in (
            lambda each: (each.slots.ids, *each.slots.stored),
            lambda each: (each.hot.ids, each.hot.rows, each.hot.hits),
        ):
            for one, other in zip(of(at_once), of(apart), strict=True):
                np.testing.assert_array_equal(one, other)


def rows_of(ids, counts):
    """Rows [n, 2, 4] that tell token and head."""
    heads = np.repeat(np.arange(len(counts)), counts)
    return np.repeat((ids + 100.0 * heads).astype(np.float32), 8).reshape(-1, 2, 4)


def test_what_cannot_have_a_slot_is_refused():
    slots, none = np.full((2, 3), EMPTY, np.uint32), np.zeros((2, 0), np.uint32)
    ids = np.arange(4, dtype=np.uint32)
    with pytest.raises(InvalidInput, match="more tokens are wanted"):
        exchange(slots, none, ids, np.array([4, 0]), 40)
    with pytest.raises(InvalidInput, match="token 3 is wanted of a context of 3"):
        exchange(slots, none, ids, np.array([2, 2]), 3)
    with pytest.raises(InvalidInput, match="KV heads"):
        exchange(slots, none, ids, np.array([4]), 40)
