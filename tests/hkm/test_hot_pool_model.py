"""The hot pool against a model of it: hit counts, ageing, who stays, and whose rows these are."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hillinfer.hkm import hot_pool
from hillinfer.hkm.hot_pool import HotPool
from hillinfer.hkm.slots import EMPTY
from hillinfer_core.places import exchange

TOKENS = 24
MOST, AGE_EVERY, HIT = 9, 7, 2


@pytest.fixture
def short_lives(monkeypatch):
    """Counters that saturate and age within a few steps."""
    monkeypatch.setattr(hot_pool, "_MAX_HITS", MOST)
    monkeypatch.setattr(hot_pool, "HIT", HIT)
    monkeypatch.setattr(hot_pool, "_AGE_EVERY", AGE_EVERY)


OPERATIONS = st.one_of(
    st.tuples(st.just("select"), st.sets(st.integers(0, TOKENS - 1), min_size=1, max_size=8)),
    st.tuples(st.just("select"), st.sets(st.integers(0, 5), min_size=1, max_size=4)),
    st.tuples(st.just("release"), st.sets(st.integers(0, TOKENS - 1), min_size=1, max_size=8)),
    st.tuples(st.just("resize"), st.integers(1, 12)),
    st.tuples(st.just("crop"), st.integers(0, TOKENS)),
)


class Model:
    """What the pool should know: hits of each token, and which writing of its row is the valid one."""

    def __init__(self):
        self.hits = np.zeros(TOKENS, int)
        self.written = np.ones(TOKENS, int)
        self.selections = 0

    def select(self, wanted):
        self.hits[wanted] = np.minimum(self.hits[wanted] + HIT, MOST)
        self.selections += 1
        if self.selections % AGE_EVERY == 0:
            self.hits //= 2

    def crop(self, tokens):
        self.hits[tokens:] = 0
        self.written[tokens:] += 1

    def rows(self, ids):
        """Rows that tell token and writing."""
        return np.stack([ids, self.written[ids]], -1).astype(np.float32)[:, :, None].repeat(4, -1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 12), st.lists(OPERATIONS, min_size=1, max_size=60))
def test_hot_pool_against_a_model(short_lives, capacity, operations):
    pool, model = HotPool(1, 1, 4, np.float32), Model()
    pool.resize(capacity)
    for kind, what in operations:
        before = held(pool)
        if kind == "resize":
            pool.resize(what)
            assert held(pool) <= before
        elif kind == "crop":
            pool.crop(0, what)
            model.crop(what)
            assert held(pool) == {token for token in before if token < what}
        elif kind == "release":
            wanted = np.array(sorted(what), np.uint32)
            slots = np.full((1, len(wanted)), EMPTY, np.uint32)
            done = exchange(slots, pool.ids[0], wanted, np.array([len(wanted)]), TOKENS)
            assert slots[0].tolist() == wanted.tolist()
            found = wanted[done.hot_slots]
            assert set(found) == what & before
            assert np.array_equal(pool.flat_rows(0)[done.hot_places], model.rows(found))
            assert held(pool) == before - what
        else:
            wanted = np.array(sorted(what), np.uint32)
            pool.count(0, wanted, np.array([len(wanted)]), TOKENS)
            model.select(wanted)
            missing = wanted[~np.isin(wanted, list(before))]
            pool.offer(0, missing, np.array([len(missing)]), model.rows(missing))
            check_exchange(before, held(pool), missing, model.hits, pool.capacity)
        ids = pool.ids[0, 0]
        kept = ids != EMPTY
        assert len(set(ids[kept])) == kept.sum() <= pool.capacity
        assert np.array_equal(pool.rows[0, 0, kept], model.rows(ids[kept]))
        counted = pool.hits[0, 0]
        assert counted.dtype == np.uint16
        assert np.array_equal(counted[:TOKENS], model.hits if len(counted) else [])


def held(pool):
    return {int(token) for token in pool.ids[0, 0] if token != EMPTY}


def check_exchange(before, after, offered, hits, capacity):
    """Who came in was selected strictly more often than who went out; who was turned away, not more."""
    came, went = after - before, before - after
    turned_away = {int(token) for token in offered} - after
    assert came <= {int(token) for token in offered}
    assert not went or hits[list(went)].max() < hits[list(came)].min()
    assert not turned_away or (
        len(after) == capacity and hits[list(turned_away)].max() <= hits[list(after)].min()
    )
