"""Histogram and data checksum, against their wording in docs/evaluation.md."""

import numpy as np
import pytest

from hillinfer_core import kernel, reference
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Precision, tile_bytes

BINS = reference.HISTOGRAM_BINS


def random_tiles(seed, heads, tiles, dim, precision):
    shape = (heads, tiles, tile_bytes(dim, precision))
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("dim", [8, 80, 256])
def test_every_score_has_a_bin_and_bins_are_ordered(precision, vectors, dim):
    tiles = random_tiles(1, 2, 5, dim, precision)
    q = np.random.default_rng(2).integers(-127, 128, (2, vectors, dim)).astype(np.int8)
    offsets = np.random.default_rng(3).integers(-50_000, 1, (2, vectors)).astype(np.int32)
    scores = np.empty((2, 80), np.int32)
    reference.scores(tiles, q, precision, scores, offsets=offsets)
    counts = reference.histogram(scores, q, precision, offsets=offsets)
    low, shift = reference.score_range(q, precision, offsets=offsets)
    assert counts.shape == (2, BINS)
    assert counts.sum(axis=1).tolist() == [80, 80]
    for head in range(2):
        for b in np.flatnonzero(counts[head]):
            start = int(low[head]) + (int(b) << int(shift[head]))
            inside = (scores[head] >= start) & (scores[head] < start + (1 << int(shift[head])))
            assert inside.sum() == counts[head, b]


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("dtype", [np.int8, np.int16])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_scores_stay_in_the_bins_and_in_int32(precision, dtype, sign):
    q = np.full((1, 1, 256), sign * np.iinfo(dtype).max, dtype)
    extreme = sign * 256 * np.iinfo(dtype).max * precision.levels
    assert abs(extreme) < 2**31
    counts = reference.histogram(np.array([[0, extreme]], np.int32), q, precision)
    low, shift = reference.score_range(q, precision)
    assert int(low[0]) == min(0, extreme)
    assert np.flatnonzero(counts[0]).tolist() == [0, abs(extreme) >> int(shift[0])]
    assert abs(extreme) >> int(shift[0]) >= BINS // 2


def test_a_query_of_zeros_has_one_bin():
    counts = reference.histogram(np.zeros((1, 7), np.int32), np.zeros((1, 1, 8), np.int8), Precision.int8)
    assert counts[0, 0] == counts.sum() == 7


def test_the_checksum_follows_its_definition():
    tiles = random_tiles(3, 2, 3, 24, Precision.int8)
    for head in range(2):
        sums = [[0] * 16, [0] * 16]
        data = tiles[head].tobytes()
        for at in range(0, len(data), 64):
            for lane in range(16):
                word = int.from_bytes(data[at + 4 * lane : at + 4 * lane + 4], "little")
                sums[0][lane] = (sums[0][lane] + word) % 2**64
                sums[1][lane] = (sums[1][lane] + sums[0][lane]) % 2**64
        packed = b"".join(value.to_bytes(8, "little") for value in sums[0] + sums[1])
        expected = reference.row_checksums(np.frombuffer(packed, np.uint8)[None])[0]
        assert reference.data_checksum(tiles)[head] == expected


@pytest.mark.parametrize("precision", Precision)
def test_any_changed_bit_and_any_exchange_of_beats_changes_the_checksum(precision):
    tiles = random_tiles(4, 1, 2, 16, precision)
    right = reference.data_checksum(tiles)[0]
    for position in range(0, tiles.size, 3):
        for bit in range(8):
            tiles.reshape(-1)[position] ^= 1 << bit
            assert reference.data_checksum(tiles)[0] != right
            tiles.reshape(-1)[position] ^= 1 << bit
    beats = tiles.reshape(1, -1, 64)
    beats[0, [0, 2]] = beats[0, [2, 0]]
    assert reference.data_checksum(tiles)[0] != right


def test_a_stuck_top_bit_changes_the_checksum():
    tiles = np.zeros((1, 64, 128), np.uint8)
    right = reference.data_checksum(tiles)[0]
    tiles[0, [0, 2, 4, 6], 3] = 0x80
    assert reference.data_checksum(tiles)[0] != right


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("dim", [8, 80, 256])
@pytest.mark.parametrize("tiles", [1, 2, 37])
def test_native_checksums_follow_the_definition(variant, precision, dim, tiles):
    keys = random_tiles(5, 3, tiles, dim, precision)
    np.testing.assert_array_equal(kernel.data_checksums(keys), reference.data_checksum(keys))
    if tiles > 1:
        np.testing.assert_array_equal(
            kernel.data_checksums(keys[1:, 1:]), reference.data_checksum(keys[1:, 1:])
        )
    full = np.full_like(keys, 255)
    np.testing.assert_array_equal(kernel.data_checksums(full), reference.data_checksum(full))


def test_checksums_refuse_tiles_that_are_none():
    keys = np.zeros((2, 4, 128), np.uint8)
    for bad in (keys.astype(np.int8), keys[0], keys[:, :0], keys[..., :96], keys[:, ::2], keys[:, :, :64]):
        with pytest.raises(InvalidInput):
            kernel.data_checksums(bad)
    assert kernel.data_checksums(keys[:0]).shape == (0,)
