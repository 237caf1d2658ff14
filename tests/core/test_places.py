"""Ids exchanged, counted and kept in native code, against the definitions in plain Python."""

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hillinfer_core.moves import put_rows
from hillinfer_core.places import count_hits, exchange, keep

EMPTY = 0xFFFFFFFF


def defined_exchange(slots, hot, wanted, tokens):
    """Of one head: (missing ids and slots), (slots and places of those in hot), (left ids and slots)."""
    assert all(each < tokens for each in wanted)
    free = [place for place, each in enumerate(slots) if each not in wanted]
    left = [(slots[place], place) for place in free if slots[place] != EMPTY]
    given = dict(zip([each for each in wanted if each not in slots], free, strict=False))
    for place in free:
        slots[place] = EMPTY
    for each, place in given.items():
        slots[place] = each
    found = [(given[each], place) for place, each in enumerate(hot) if each in given]
    for _, place in found:
        del given[hot[place]]
        hot[place] = EMPTY
    return list(given.items()), found, left


def defined_keep(hot, hits, ids):
    """Of one head: which ids are kept, and their places."""

    def worth(each):
        return hits[each] if each < len(hits) else 0

    offered = sorted(range(len(ids)), key=lambda index: (-worth(ids[index]), index))
    free = [place for place, each in enumerate(hot) if each == EMPTY]
    victims = sorted((worth(each), place) for place, each in enumerate(hot) if each != EMPTY)
    kept = list(zip(offered, free, strict=False))
    for index, (held, place) in zip(offered[len(free) :], victims, strict=False):
        if worth(ids[index]) <= held:
            break
        kept.append((index, place))
    for index, place in kept:
        hot[place] = ids[index]
    return kept


def columns(pairs):
    return [list(each) for each in zip(*pairs, strict=True)] or [[], []]


@pytest.fixture(params=["1", "4"])
def threads(request, monkeypatch):
    """Also by several threads, and those for little."""
    monkeypatch.setenv("HILLINFER_KERNEL_THREADS", request.param)
    if request.param != "1":
        monkeypatch.setattr("hillinfer_core.places._THREAD_BYTES", 1)
        monkeypatch.setattr("hillinfer_core.places._COUNT_THREAD_BYTES", 1)


CASES = given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.integers(1, 5),
    slot_count=st.sampled_from([0, 1, 6, 300]),
    hot_count=st.sampled_from([0, 1, 7, 900]),
    most=st.sampled_from([0, 3, 300, 65535]),
)


@pytest.mark.usefixtures("threads")
class TestByDefinition:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @CASES
    def test_ids_are_exchanged(self, seed, heads, slot_count, hot_count, most):
        rng, tokens = np.random.default_rng(seed), slot_count + hot_count + int(most) % 400 + 1
        slots, hot = held(rng, heads, slot_count, hot_count, tokens)
        wanted = [
            np.sort(rng.permutation(tokens)[: int(rng.integers(0, slot_count + 1))]) for _ in range(heads)
        ]
        one, other = slots.tolist(), hot.tolist()
        missing, found, left = [], [], []
        counts = []
        for head in range(heads):
            lacking, in_hot, gone = defined_exchange(one[head], other[head], wanted[head].tolist(), tokens)
            counts.append((len(lacking), len(gone)))
            missing += [(each, head * slot_count + place) for each, place in lacking]
            found += [(head * slot_count + slot, head * hot_count + place) for slot, place in in_hot]
            left += [(each, head * slot_count + place) for each, place in gone]
        sizes = np.array([len(each) for each in wanted])
        done = exchange(slots, hot, np.concatenate(wanted).astype(np.uint32), sizes, tokens)
        assert slots.tolist() == one
        assert hot.tolist() == other
        assert [done.missing_ids.tolist(), done.missing_places.tolist()] == columns(missing)
        assert [done.hot_slots.tolist(), done.hot_places.tolist()] == columns(found)
        assert [done.left_ids.tolist(), done.left_places.tolist()] == columns(left)
        told = zip(done.missing_counts.tolist(), done.left_counts.tolist(), strict=True)
        assert list(told) == counts

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @CASES
    def test_what_is_hit_more_is_kept(self, seed, heads, slot_count, hot_count, most):
        rng, tokens = np.random.default_rng(seed), slot_count + hot_count + 5
        offered, hot = held(rng, heads, slot_count, hot_count, tokens)
        hits = rng.integers(0, most + 1, (heads, max(tokens - int(rng.integers(0, 9)), 0)))
        ids = [each[each != EMPTY] for each in offered]
        expected, then, first = [], hot.tolist(), 0
        for head in range(heads):
            kept = defined_keep(then[head], hits[head].tolist(), ids[head].tolist())
            expected += [(first + index, head * hot_count + place) for index, place in kept]
            first += len(ids[head])
        counts = np.array([len(each) for each in ids])
        which, places = keep(hot, hits.astype(np.uint16), np.concatenate(ids), counts)
        assert [which.tolist(), places.tolist()] == columns(expected)
        assert hot.tolist() == then

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @CASES
    def test_selections_are_counted(self, seed, heads, slot_count, hot_count, most):
        rng, tokens = np.random.default_rng(seed), slot_count + 5
        ids = [rng.permutation(tokens)[: int(rng.integers(0, slot_count + 1))] for _ in range(heads)]
        hits = rng.integers(0, most + 1, (heads, tokens)).astype(np.uint16)
        expected = hits.astype(int)
        for head, each in enumerate(ids):
            expected[head, each] = np.minimum(expected[head, each] + hot_count, most)
        counts = np.array([len(each) for each in ids])
        count_hits(hits, np.concatenate(ids).astype(np.uint32), counts, hot_count, most)
        assert np.array_equal(hits, expected)


def held(rng, heads, slot_count, hot_count, tokens):
    """Ids in slots and in the hot pool, each in one of them at most; some places are empty."""
    ids = np.stack([rng.permutation(tokens)[: slot_count + hot_count] for _ in range(heads)])
    ids = np.where(rng.random(ids.shape) < 0.2, EMPTY, ids).astype(np.uint32)
    return ids[:, :slot_count].copy(), ids[:, slot_count:].copy()


def test_who_finds_all_threads_at_work_does_the_same_alone(monkeypatch):
    """Several callers at once, each with work for several threads."""
    monkeypatch.setenv("HILLINFER_KERNEL_THREADS", "8")
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 60000, (9000, 2, 128)).astype(np.uint16)
    wrong = []

    def work(seed):
        which = np.random.default_rng(seed).permutation(len(rows))[:6000]
        for _ in range(20):
            out = np.zeros((6000, 2, 128), np.uint16)
            put_rows(rows, which, out, None)
            if not np.array_equal(out, rows[which]):
                wrong.append(seed)

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert not wrong
