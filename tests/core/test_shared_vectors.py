"""The native kernel on the shared vectors, and on what hypothesis makes, bit for bit."""

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hillinfer_core import kernel, reference
from hillinfer_core.errors import Cancelled, ConfigError, InvalidInput
from hillinfer_core.layout import Precision, tile_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "vectors"))
import evaluation_vectors
from evaluation_vectors import Case

FIELDS = ("ids", "scores", "histogram", "checksums")


def assert_same(found: reference.Ranked, expected: reference.Ranked) -> None:
    for field in FIELDS:
        mine, right = getattr(found, field), getattr(expected, field)
        assert (mine is None) == (right is None), field
        if mine is not None:
            assert mine.dtype == right.dtype, field
            np.testing.assert_array_equal(mine, right, err_msg=field)


def ranked(case: Case, parts=None, **more) -> reference.Ranked:
    more = {"histogram": True, "checksums": True, "offsets": case.offsets, **more}
    first, end = case.first_id + case.begin, case.first_id + case.end
    return kernel.rank(
        parts or [case.tiles], case.q, case.precision, first, end, case.k, origin=case.first_id, **more
    )


def check(case: Case, expected: reference.Ranked) -> None:
    assert_same(ranked(case), expected)
    # Without a histogram only candidates are counted: another way to the same result.
    assert_same(
        ranked(case, histogram=False, checksums=False), reference.Ranked(expected.ids, expected.scores)
    )


def test_the_vectors_are_what_they_are_said_to_be():
    names = [case.name for case in (*evaluation_vectors.cases(), *evaluation_vectors.grid())]
    names += [case.name for case in evaluation_vectors.large()]
    assert len(set(names)) == len(names) >= 200
    found = {(c.precision, c.q.shape[2], c.q.shape[1]) for c in evaluation_vectors.grid()}
    assert found == {(p, d, g) for p in Precision for d in (32, 64, 80, 96, 128, 256) for g in range(1, 9)}


def test_every_small_case_agrees(variant):
    for case in (*evaluation_vectors.cases(), *evaluation_vectors.grid()):
        check(case, case.expected())


@pytest.fixture(scope="module")
def large():
    return [(case, case.expected()) for case in evaluation_vectors.large()]


@pytest.mark.parametrize("threads", ["1", "3"])
def test_every_large_case_agrees(variant, large, threads, monkeypatch):
    monkeypatch.setenv("HILLINFER_KERNEL_THREADS", threads)
    for case, expected in large:
        check(case, expected)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), precision=st.sampled_from(Precision),
       dim=st.sampled_from([8, 32, 64, 80, 96, 128, 256]), dtype=st.sampled_from([np.int8, np.int16]),
       heads=st.integers(1, 3), per_head=st.integers(1, 3), vectors=st.integers(1, 6),
       key_levels=st.sampled_from([1, 2, 256]), query_levels=st.sampled_from([1, 3, 2**15]))  # fmt: skip
def test_what_hypothesis_makes_agrees(data, seed, precision, dim, dtype, heads, per_head, vectors, key_levels,
                                      query_levels):  # fmt: skip
    rng = np.random.default_rng(seed)
    counts = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    size = tile_bytes(dim, precision)
    parts = [rng.integers(0, key_levels, (heads, count, size)).astype(np.uint8) for count in counts]
    limit = min(query_levels, np.iinfo(dtype).max)
    q = rng.integers(-limit, limit + 1, (heads * per_head, vectors, dim)).astype(dtype)
    origin = 16 * data.draw(st.integers(0, 1000))
    stop = origin + 16 * sum(counts)
    first = data.draw(st.integers(origin, stop))
    end = data.draw(st.integers(first, stop))
    k = data.draw(st.integers(0, end - first + 2))
    offsets = None
    if dtype is np.int8 and data.draw(st.booleans()):
        least = data.draw(st.sampled_from([-3, -30_000, reference.LEAST_OFFSET]))
        offsets = rng.integers(least, 1, q.shape[:2]).astype(np.int32)
    asked = {
        "offsets": offsets,
        "origin": origin,
        "histogram": data.draw(st.booleans()),
        "checksums": data.draw(st.booleans()),
    }
    expected = reference.rank(parts, q, precision, first, end, k, **asked)
    for name in kernel.variants():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HILLINFER_KERNEL", name)
            patch.setenv("HILLINFER_KERNEL_THREADS", data.draw(st.sampled_from(["1", "2", "5"])))
            assert_same(kernel.rank(parts, q, precision, first, end, k, **asked), expected)


def test_blocks_merge_to_the_whole(monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK_BYTES", 40_000)
    case = evaluation_vectors.Maker(9)("blocks", Precision.int8, 2, 2, 64, 37, 2031, 200, first_id=160)
    parts = [case.tiles[:, at : at + 9] for at in range(0, 127, 9)]
    taken = []
    blocks = kernel.rank_blocks(
        (taken.append(at) or part for at, part in enumerate(parts)), case.q, case.precision, 197, 2191, 200,
        offsets=case.offsets, origin=160, histogram=True, checksums=True,
    )  # fmt: skip
    first = next(blocks)
    assert len(taken) == 3  # the next part is not asked for before it is needed
    merged = kernel.merge([first, *blocks], case.k)
    whole = reference.rank(
        parts, case.q, case.precision, 197, 2191, case.k,
        offsets=case.offsets, origin=160, histogram=True, checksums=True,
    )  # fmt: skip
    assert_same(merged, whole)
    with pytest.raises(InvalidInput, match="not among"):
        list(kernel.rank_blocks(parts, case.q, case.precision, 0, 9999, 5, origin=160))


def test_parts_may_be_slices_that_are_strided_by_head(variant):
    case = evaluation_vectors.Maker(10)("strided", Precision.int4, 3, 1, 96, 0, 640, 77)
    whole = np.zeros((3, 100, case.tiles.shape[2]), np.uint8)
    whole[:, 20:60] = case.tiles
    assert_same(ranked(case, [whole[:, 20:31], whole[:, 31:60]], checksums=False),
                ranked(case, checksums=False))  # fmt: skip


def test_a_cancelled_ranking_says_so_and_the_next_one_works():
    case = evaluation_vectors.Maker(11)("cancel", Precision.int8, 2, 1, 64, 0, 5000, 50)
    cancel = kernel.Cancel()
    assert_same(ranked(case, cancel=cancel), case.expected())
    cancel.set()
    assert cancel.is_set()
    with pytest.raises(Cancelled):
        ranked(case, cancel=cancel)
    assert_same(ranked(case), case.expected())


def test_a_long_ranking_is_cancelled_from_another_thread():
    # 40 query rows of 2048 vectors: seconds of work, of which it does a block of each thread.
    tiles = np.zeros((1, 4096, 1024), np.uint8)
    q = np.ones((40, 2048, 64), np.int8)
    cancel = kernel.Cancel()
    timer = threading.Timer(0.05, cancel.set)
    timer.start()
    with pytest.raises(Cancelled):
        kernel.rank([tiles], q, Precision.int8, 0, 65536, 10, cancel=cancel)
    timer.join()


def test_many_callers_at_once_get_their_own_results():
    made = evaluation_vectors.Maker(12)
    cases = [
        made(f"caller{number}", Precision.int4, 2, 1, 64, 0, 20_000, 100 + number) for number in range(6)
    ]
    found = {}
    callers = [
        threading.Thread(target=lambda case=case: found.update({case.name: [ranked(case) for _ in range(5)]}))
        for case in cases
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for case in cases:
        for result in found[case.name]:
            assert_same(result, case.expected())


def test_idle_threads_use_no_processor_time(monkeypatch):
    monkeypatch.setenv("HILLINFER_KERNEL_THREADS", "4")
    case = evaluation_vectors.Maker(13)("idle", Precision.int8, 4, 1, 64, 0, 50_000, 10)
    ranked(case)
    before = time.process_time()
    time.sleep(0.3)
    # Spinning threads would have used 0.9 s or as much as the processors give.
    assert time.process_time() - before < 0.05


def test_rank_refuses_what_does_not_fit():
    tiles, q = np.zeros((2, 3, 128), np.uint8), np.zeros((4, 1, 8), np.int8)

    def rank(parts=(tiles,), q=q, first=0, end=48, k=1, **more):
        return kernel.rank(parts, q, Precision.int8, first, end, k, **more)

    assert rank().ids.shape == (4, 1)
    assert rank(parts=[], end=0).ids.shape == (4, 0)
    for bad in (
        {"parts": [tiles.astype(np.int8)]},
        {"parts": [tiles[0]]},
        {"parts": [tiles, tiles[:1]]},
        {"parts": [tiles[:, :, :64]]},
        {"parts": [tiles[:, ::2]]},
        {"parts": [tiles[:, :0]], "end": 0},
        {"q": q.astype(np.int32)},
        {"q": q[:3]},
        {"q": q[:0]},
        {"q": q[:, :0]},
        {"q": q[..., :7]},
        {"first": -1},
        {"end": 49},
        {"first": 9, "end": 8},
        {"origin": 8, "first": 8},
        {"origin": 2**32 - 16, "first": 2**32 - 16, "end": 2**32},
        {"k": -1},
        {"offsets": np.zeros((4, 2), np.int32)},
        {"offsets": np.zeros((4, 1), np.int64)},
        {"offsets": np.ones((4, 1), np.int32)},
        {"offsets": np.full((4, 1), reference.LEAST_OFFSET - 1, np.int32)},
        {"q": q.astype(np.int16), "offsets": np.full((4, 1), -1, np.int32)},
    ):
        with pytest.raises(InvalidInput):
            rank(**bad)


@pytest.mark.parametrize("asked", ["0", "-1", "many", "99999"])
def test_a_number_of_threads_that_cannot_be_is_refused(monkeypatch, asked):
    monkeypatch.setenv("HILLINFER_KERNEL_THREADS", asked)
    with pytest.raises(ConfigError, match="HILLINFER_KERNEL_THREADS"):
        kernel.threads()


def test_the_streaming_read_reads_everything(variant):
    data = np.random.default_rng(0).integers(0, 256, 3 * (1 << 20) + 704, np.uint8)
    assert kernel.stream_read(data) == int(data.view("<u8").sum(dtype=np.uint64))
    assert kernel.stream_read(data[:0]) == 0
    with pytest.raises(InvalidInput):
        kernel.stream_read(data[1:])
