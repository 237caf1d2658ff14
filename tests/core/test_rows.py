"""Which rows are wanted and where they lie, against plain numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hillinfer_core.errors import InvalidInput
from hillinfer_core.rows import locate, missing

EMPTY = 0xFFFFFFFF


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1), k=st.integers(0, 40), slots=st.integers(0, 60), end=st.integers(40, 300)
)
def test_missing_ids_are_those_not_held(seed, k, slots, end):
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.permuted(np.tile(np.arange(end, dtype=np.uint32), (3, 1)), axis=1)[:, :k], axis=1)
    held = rng.integers(0, end + 70, (3, slots)).astype(np.uint32)  # repeats, and tokens that there are not
    held[rng.random(held.shape) < 0.2] = EMPTY
    counts, heads, tokens = missing(ids, held, end)
    expected = [mine[~np.isin(mine, theirs)] for mine, theirs in zip(ids, held, strict=True)]
    assert counts.tolist() == [len(each) for each in expected]
    np.testing.assert_array_equal(heads, np.repeat(np.arange(3), counts))
    np.testing.assert_array_equal(tokens, np.concatenate(expected))


def test_missing_ids_of_other_heads_than_held():
    with pytest.raises(InvalidInput, match="KV heads"):
        missing(np.zeros((2, 1), np.uint32), np.zeros((1, 1), np.uint32), 1)


EXTENTS = np.array([[0, 256, 512], [256, 300, 64], [4096, 1 << 30, 1 << 20]], np.int64)


def test_rows_lie_head_by_head_in_the_extent_of_their_token():
    sums = np.arange(2 * 600, dtype=np.uint32).reshape(2, 600)
    rng = np.random.default_rng(0)
    heads, tokens = rng.integers(0, 2, 500), rng.integers(0, 576, 500)
    offsets, found = locate(EXTENTS, 512, 576, sums, heads, tokens)
    np.testing.assert_array_equal(found, sums[heads, tokens])
    for offset, head, token in zip(offsets.tolist(), heads.tolist(), tokens.tolist(), strict=True):
        start, stride, base = EXTENTS[:, token >= EXTENTS[0]][:, -1].tolist()
        assert offset == base + (head * stride + token - start) * 512


@pytest.mark.parametrize(("head", "token"), [(2, 0), (-1, 0), (0, 576), (0, -1), (1, 1 << 40)])
def test_a_row_that_does_not_exist(head, token):
    sums = np.zeros((2, 600), np.uint32)
    with pytest.raises(InvalidInput, match="does not exist"):
        locate(EXTENTS, 512, 576, sums, np.array([0, head]), np.array([0, token]))
    with pytest.raises(InvalidInput, match="does not exist"):
        locate(EXTENTS[:, :0].copy(), 512, 576, sums, np.array([0]), np.array([0]))
