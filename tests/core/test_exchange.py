"""What passes through a client's arena for an evaluation, against plain numpy."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hillinfer_core.arena import Arena, create_arena
from hillinfer_core.errors import InvalidInput
from hillinfer_core.exchange import HeldKeys, Winners, evaluate, hand_over, quantised_query
from hillinfer_core.kernel import rank
from hillinfer_core.layout import Precision, Reduction, tile_bytes
from hillinfer_core.packed import NOT_WANTED, Item, Region
from hillinfer_core.reference import Ranges, quantise_query
from hillinfer_core.rows import RowPlaces, locate

EMPTY = 0xFFFFFFFF
NBYTES = 1 << 16
HELD_AT, IDS_AT, SCORES_AT = 4, 8192, 16384
EXTENTS = np.array([[0, 256, 512], [256, 300, 64], [4096, 1 << 30, 1 << 20]], np.int64)
SUMS = np.arange(3 * 600, dtype=np.uint32).reshape(3, 600)
PLACES = RowPlaces(EXTENTS, 512, 576, SUMS)


@pytest.fixture(scope="module")
def arena():
    fd = create_arena(NBYTES, "test")
    yield Arena(fd, NBYTES)
    os.close(fd)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(0, 40),
    slots=st.integers(0, 60),
    end=st.integers(40, 576),
    most=st.integers(0, 130),
)
def test_winners_are_handed_over_and_those_not_held_are_found(arena, seed, k, slots, end, most):
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.permuted(np.tile(np.arange(end, dtype=np.uint32), (3, 1)), axis=1)[:, :k], axis=1)
    scores = rng.integers(-1000, 1000, ids.shape).astype(np.int32)
    held = rng.integers(0, end + 70, (3, slots)).astype(np.uint32)  # repeats, and tokens that there are not
    held[rng.random(held.shape) < 0.2] = EMPTY
    arena.view(HELD_AT, held.shape, np.uint32)[:] = held
    won = Winners(np.ascontiguousarray(ids), scores, end, IDS_AT, SCORES_AT if seed % 2 else None)
    lacking = hand_over(arena, won, Region(HELD_AT, held.nbytes), PLACES, most)
    np.testing.assert_array_equal(arena.view(IDS_AT, ids.shape, np.uint32), ids)
    if seed % 2:
        np.testing.assert_array_equal(arena.view(SCORES_AT, ids.shape, np.int32), scores)
    expected = [mine[~np.isin(mine, theirs)] for mine, theirs in zip(ids, held, strict=True)]
    assert lacking.counts == [len(each) for each in expected]
    np.testing.assert_array_equal(lacking.heads, np.repeat(np.arange(3), lacking.counts)[:most])
    np.testing.assert_array_equal(lacking.ids, np.concatenate(expected)[:most])
    offsets, checksums = locate(PLACES, lacking.heads, lacking.ids)
    np.testing.assert_array_equal(lacking.offsets, offsets)
    np.testing.assert_array_equal(lacking.checksums, checksums)


@pytest.mark.parametrize("at", [NBYTES, NBYTES - 4, 2, 1 << 40, (1 << 64) - 4])
@pytest.mark.parametrize("what", ["ids", "scores", "held"])
def test_a_region_outside_the_arena(arena, what, at):
    ids, scores = np.zeros((3, 2), np.uint32), np.zeros((3, 2), np.int32)
    places = {"ids": IDS_AT, "scores": SCORES_AT, "held": HELD_AT} | {what: at}
    won = Winners(ids, scores, 576, places["ids"], places["scores"])
    with pytest.raises(InvalidInput, match="arena"):
        hand_over(arena, won, Region(places["held"], 24), PLACES, 6)


@pytest.mark.parametrize("at", [NBYTES, NBYTES - 4, 2, 1 << 40, (1 << 64) - 4])
def test_a_query_outside_the_arena(arena, at):
    ranges = Ranges(np.ones((3, 8), np.float32), np.zeros((3, 8), np.float32))
    with pytest.raises(InvalidInput, match="arena"):
        quantised_query(arena, at, 3, ranges, Reduction.sum)


def test_a_winner_without_a_row(arena):
    won = Winners(np.full((3, 1), 576, np.uint32), np.zeros((3, 1), np.int32), 600, IDS_AT, None)
    with pytest.raises(InvalidInput, match="does not exist"):
        hand_over(arena, won, Region(HELD_AT, 0), PLACES, 3)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), group=st.integers(1, 5), reduction=st.sampled_from(["sum", "max"]))
def test_a_query_in_the_arena_is_quantised_as_defined(arena, seed, group, reduction):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((3 * group, 16)).astype(np.float32)
    ranges = Ranges(
        rng.uniform(0.1, 2, (3, 16)).astype(np.float32), rng.standard_normal((3, 16)).astype(np.float32)
    )
    arena.view(64, query.shape, np.float32)[:] = query
    q, offsets = quantised_query(arena, 64, 3 * group, ranges, Reduction[reduction])
    expected_q, expected_offsets, _ = quantise_query(query, ranges, Reduction[reduction])
    np.testing.assert_array_equal(q, expected_q)
    np.testing.assert_array_equal(offsets, expected_offsets)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), group=st.integers(1, 4),
       reduction=st.sampled_from([Reduction.sum, Reduction.max]), precision=st.sampled_from(Precision),
       most=st.integers(0, 60))  # fmt: skip
def test_one_call_for_keys_in_memory_does_what_three_do(arena, data, seed, group, reduction, precision, most):
    rng = np.random.default_rng(seed)
    counts = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    origin = 16 * data.draw(st.integers(0, 36 - sum(counts)) if sum(counts) < 36 else st.just(0))
    stop = min(576, origin + 16 * sum(counts))
    first = data.draw(st.integers(origin, stop - 1))
    end = data.draw(st.integers(first + 1, stop))
    k = data.draw(st.integers(1, min(end - first, 40)))
    parts = [rng.integers(0, 256, (3, count, tile_bytes(16, precision))).astype(np.uint8) for count in counts]
    query = rng.standard_normal((3 * group, 16)).astype(np.float32)
    ranges = Ranges(
        rng.uniform(0.1, 2, (3, 16)).astype(np.float32), rng.standard_normal((3, 16)).astype(np.float32)
    )
    held = rng.integers(0, end + 70, (3, data.draw(st.integers(0, 60)))).astype(np.uint32)
    arena.view(HELD_AT, held.shape, np.uint32)[:] = held
    arena.view(24576, query.shape, np.float32)[:] = query
    region, scores = Region(HELD_AT, held.nbytes), Region(SCORES_AT, 12 * k)
    query_at, ids_at = Region(24576, query.nbytes), Region(IDS_AT, 12 * k)
    item = Item(1, first, end, k, query_at, ids_at, scores, region, NOT_WANTED)

    q, offsets = quantised_query(arena, 24576, 3 * group, ranges, reduction)
    ranked = rank(parts, q, precision, first, end, k, offsets=offsets, origin=origin)
    won = Winners(ranked.ids, ranked.scores, end, IDS_AT, SCORES_AT)
    expected = hand_over(arena, won, region, PLACES, most)
    arena.view(IDS_AT, (3, k), np.uint32)[:] = 0
    arena.view(SCORES_AT, (3, k), np.int32)[:] = 0
    keys = HeldKeys(parts, origin, precision.bits)
    lacking, scan_s = evaluate(arena, item, 3 * group, reduction, ranges, keys, PLACES, most)
    np.testing.assert_array_equal(arena.view(IDS_AT, (3, k), np.uint32), ranked.ids)
    np.testing.assert_array_equal(arena.view(SCORES_AT, (3, k), np.int32), ranked.scores)
    assert scan_s > 0
    for mine, theirs in zip(lacking, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("changed", "keys", "said"),
    [
        ({"query": Region(NBYTES - 64, 192)}, {}, "arena"),
        ({"ids": Region(NBYTES - 8, 12)}, {}, "arena"),
        ({"scores": Region(2, 12)}, {}, "arena"),
        ({"held": Region(1 << 40, 12)}, {}, "arena"),
        ({"end_token": 49}, {}, "tokens 0 to 49"),
        ({}, {"origin": 16}, "tokens 0 to 48"),
        ({}, {"bits": 8}, "keys in memory"),
        ({}, {"parts": [np.zeros((2, 3, 128), np.uint8)]}, "keys in memory"),
        ({}, {"parts": [np.zeros((3, 3, 256), np.uint8)[:, :, ::2]]}, "keys in memory"),
    ],
)
def test_one_call_that_cannot_be_carried_out(arena, changed, keys, said):
    ranges = Ranges(np.ones((3, 16), np.float32), np.zeros((3, 16), np.float32))
    arena.view(24576, (3, 16), np.float32)[:] = 1
    regions = Region(24576, 192), Region(IDS_AT, 12), Region(SCORES_AT, 12), NOT_WANTED
    item = Item(1, 0, 48, 1, *regions, NOT_WANTED)._replace(**changed)
    held = HeldKeys([np.zeros((3, 3, 128), np.uint8)], 0, 4)._replace(**keys)
    with pytest.raises(InvalidInput, match=said):
        evaluate(arena, item, 3, Reduction.sum, ranges, held, PLACES, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite(arena, bad):
    query = np.zeros((3, 16), np.float32)
    query[2, 3] = bad
    arena.view(64, query.shape, np.float32)[:] = query
    ranges = Ranges(np.ones((3, 16), np.float32), np.zeros((3, 16), np.float32))
    with pytest.raises(InvalidInput, match="NaN"):
        quantised_query(arena, 64, 3, ranges, Reduction.sum)
    item = Item(1, 0, 16, 1, Region(64, 192), Region(IDS_AT, 12), NOT_WANTED, NOT_WANTED, NOT_WANTED)
    held = HeldKeys([np.zeros((3, 1, 128), np.uint8)], 0, 4)
    with pytest.raises(InvalidInput, match="NaN"):
        evaluate(arena, item, 3, Reduction.sum, ranges, held, PLACES, 3)
