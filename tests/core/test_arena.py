"""The arena: sizes, seals, bounds, and that both sides see the same bytes."""

import gc
import mmap
import os

import numpy as np
import pytest

from hillinfer_core.arena import Arena, create_arena
from hillinfer_core.errors import InvalidInput


@pytest.fixture
def fd():
    fd = create_arena(10_000, "test")
    yield fd
    os.close(fd)


def test_size_is_whole_pages(fd):
    assert os.fstat(fd).st_size == 12_288
    assert not os.get_inheritable(fd)


@pytest.mark.parametrize("size", [0, 4096, 1 << 20])
def test_seals_hold(fd, size):
    with pytest.raises(PermissionError):
        os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 12_288)


def test_two_mappings_share_their_bytes_and_outlive_the_descriptor():
    fd = create_arena(8192, "test")
    ours, theirs = Arena(fd, 8192), Arena(fd, 8192, verify=True)
    os.close(fd)
    ours.view(4096, (2, 3), np.float32)[:] = [[1, 2, 3], [4, 5, 6]]
    assert theirs.view(4096, (6,), "float32").tolist() == [1, 2, 3, 4, 5, 6]
    theirs.buffer(4096, 4)[:] = bytes(4)
    assert ours.view(4096, (), np.float32)[()] == 0


def test_a_view_keeps_the_mapping_alive(fd):
    view = Arena(fd, 8192).view(0, (8192,), np.uint8)
    gc.collect()
    view[:] = 7
    assert int(view.sum()) == 7 * 8192


@pytest.mark.parametrize(
    ("offset", "shape", "dtype"),
    [(0, (8193,), "u1"), (8192, (1,), "u1"), (-4, (1,), "f4"), (0, (-1,), "u1"), (0, (-2, -2), "u1"),
     (2, (1,), "f4"), (0, (1 << 40, 1 << 40), "f4"), (1 << 70, (1,), "u1")],
)  # fmt: skip
def test_views_out_of_bounds_are_refused(fd, offset, shape, dtype):
    with pytest.raises(InvalidInput):
        Arena(fd, 8192).view(offset, shape, dtype)


@pytest.mark.parametrize(("offset", "length"), [(0, 8193), (8193, 0), (-1, 1), (0, -1)])
def test_buffers_out_of_bounds_are_refused(fd, offset, length):
    with pytest.raises(InvalidInput):
        Arena(fd, 8192).buffer(offset, length)


def test_empty_views_are_allowed(fd):
    arena = Arena(fd, 8192)
    assert arena.view(8192, (0, 64), np.float32).shape == (0, 64)
    assert len(arena.buffer(8192, 0)) == 0


def test_a_peers_arena_must_be_large_enough_and_sealed(fd, tmp_path):
    with pytest.raises(InvalidInput, match="granted"):
        Arena(fd, 16_384, verify=True)
    unsealed = os.memfd_create("test")
    os.ftruncate(unsealed, mmap.PAGESIZE)
    with pytest.raises(InvalidInput, match="sealed"):
        Arena(unsealed, mmap.PAGESIZE, verify=True)
    os.close(unsealed)
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(4096)
        with pytest.raises(InvalidInput, match="memfd"):
            Arena(file.fileno(), 4096, verify=True)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_arena_has_at_least_a_byte(fd, nbytes):
    with pytest.raises(InvalidInput):
        create_arena(nbytes, "test")
    with pytest.raises(InvalidInput):
        Arena(fd, nbytes)
