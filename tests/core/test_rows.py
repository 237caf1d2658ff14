"""Where rows lie, against plain numpy."""

import numpy as np
import pytest

from hillinfer_core.errors import InvalidInput
from hillinfer_core.rows import RowPlaces, locate

EXTENTS = np.array([[0, 256, 512], [256, 300, 64], [4096, 1 << 30, 1 << 20]], np.int64)


def test_rows_lie_head_by_head_in_the_extent_of_their_token():
    sums = np.arange(2 * 600, dtype=np.uint32).reshape(2, 600)
    rng = np.random.default_rng(0)
    heads, tokens = rng.integers(0, 2, 500), rng.integers(0, 576, 500)
    offsets, found = locate(RowPlaces(EXTENTS, 512, 576, sums), heads, tokens)
    np.testing.assert_array_equal(found, sums[heads, tokens])
    for offset, head, token in zip(offsets.tolist(), heads.tolist(), tokens.tolist(), strict=True):
        start, stride, base = EXTENTS[:, token >= EXTENTS[0]][:, -1].tolist()
        assert offset == base + (head * stride + token - start) * 512


@pytest.mark.parametrize(("head", "token"), [(2, 0), (-1, 0), (0, 576), (0, -1), (1, 1 << 40)])
def test_a_row_that_does_not_exist(head, token):
    sums = np.zeros((2, 600), np.uint32)
    with pytest.raises(InvalidInput, match="does not exist"):
        locate(RowPlaces(EXTENTS, 512, 576, sums), np.array([0, head]), np.array([0, token]))
    with pytest.raises(InvalidInput, match="does not exist"):
        locate(RowPlaces(EXTENTS[:, :0].copy(), 512, 576, sums), np.array([0]), np.array([0]))
