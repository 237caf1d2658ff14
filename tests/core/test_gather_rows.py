"""Gathering rows from a real file, with O_DIRECT and without."""

import errno
import mmap
import os
import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hillinfer_core import transfers
from hillinfer_core.errors import InvalidInput

SIZE = 3 << 20


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(0).integers(0, 256, SIZE + 1000, np.uint8)


@pytest.fixture(scope="module")
def path(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "rows"
    path.write_bytes(content.tobytes())
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["buffered", "direct"])
def opened(request, path):
    try:
        fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if request.param else 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("this file system has no O_DIRECT")
    yield fd, request.param
    os.close(fd)


def rows_at(content, offsets, row_bytes):
    return np.stack([content[o : o + row_bytes] for o in offsets.tolist()])


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 300),
       row_bytes=st.sampled_from([32, 320, 512, 2048]),
       span=st.sampled_from([8192, SIZE]))  # fmt: skip
def test_rows_arrive_in_the_order_asked(opened, content, seed, count, row_bytes, span):
    fd, direct = opened
    offsets = np.random.default_rng(seed).integers(0, span - row_bytes, count).astype(np.uint64)
    out = np.zeros((count, row_bytes), np.uint8)
    read, requests = transfers.gather(fd, offsets, row_bytes, out, direct)
    np.testing.assert_array_equal(out, rows_at(content, offsets, row_bytes))
    assert requests <= count
    touched = {page for o in offsets.tolist() for page in range(o // 4096, (o + row_bytes - 1) // 4096 + 1)}
    if direct:
        # Requests are split at 128 KiB, a page at a split may be read by both; gaps of two are read.
        gaps = [b - a - 1 for a, b in pairwise(sorted(touched))]
        most = len(touched) + sum(gap for gap in gaps if gap <= 2) + span // 65536
        assert 4096 * len(touched) <= read <= 4096 * most
        assert requests <= 1 + sum(gap > 2 for gap in gaps) + span // 65536
    else:
        assert read <= count * row_bytes


def test_touching_pages_are_read_once(opened, content):
    fd, direct = opened
    offsets = np.arange(0, 16384, 512, dtype=np.uint64)
    out = np.zeros((32, 512), np.uint8)
    assert transfers.gather(fd, offsets, 512, out, direct) == (16384, 1)
    np.testing.assert_array_equal(out.reshape(-1), content[:16384])


def test_one_row_reads_one_page_when_direct(opened):
    fd, direct = opened
    out = np.zeros((1, 512), np.uint8)
    assert transfers.gather(fd, np.array([4096 * 7 + 512], np.uint64), 512, out, direct) == (
        (4096 if direct else 512),
        1,
    )


@pytest.mark.parametrize("count", [1, 32, 33, 200])
def test_whole_pages_are_read_in_place(opened, content, count):
    fd, direct = opened
    offsets = np.concatenate(([8192], np.arange(count) * 4096 + 32768)).astype(np.uint64)
    memory = np.frombuffer(mmap.mmap(-1, (count + 1) * 4096), np.uint8)
    for out in (memory.reshape(-1, 4096), np.empty((count + 1, 4096), np.uint8)):
        out[:] = 0
        transfers.gather(fd, offsets, 4096, out, direct)
        np.testing.assert_array_equal(out, rows_at(content, offsets, 4096))


@pytest.mark.parametrize("length", [4096, 512 << 10, (512 << 10) + 4096, SIZE - 4096])
def test_ranges_are_written_and_read(tmp_path, content, opened, length):
    _, direct = opened
    memory = np.frombuffer(mmap.mmap(-1, 2 * length), np.uint8)
    data, out = memory[:length], memory[length:]
    data[:] = content[:length]
    fd = os.open(tmp_path / "range", os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0))
    try:
        transfers.write_range(fd, 8192, data, direct)
        transfers.read_range(fd, 8192, out, direct)
        np.testing.assert_array_equal(out, data)
        with pytest.raises(OSError, match="error") as caught:
            transfers.read_range(fd, 12288, out, direct)
        assert caught.value.errno == errno.EIO
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="descriptor"):
        transfers.write_range(fd, 0, data, direct)


def test_typed_outputs_and_larger_outputs(opened, content):
    fd, direct = opened
    out = np.zeros((4, 2, 64), np.float32)
    transfers.gather(fd, np.array([512, 0], np.uint64), 512, out, direct)
    assert out.view(np.uint8).reshape(-1)[:512].tobytes() == content[512:1024].tobytes()
    assert not out[2:].any()


def test_a_file_may_end_inside_a_page_but_not_inside_a_row(opened, content):
    fd, direct = opened
    out = np.zeros((1, 512), np.uint8)
    transfers.gather(fd, np.array([SIZE + 488], np.uint64), 512, out, direct)
    np.testing.assert_array_equal(out[0], content[-512:])
    for offset in (SIZE + 489, SIZE * 4):
        with pytest.raises(OSError, match="error") as caught:
            transfers.gather(fd, np.array([offset], np.uint64), 512, out, direct)
        assert caught.value.errno == errno.EIO


def test_errors_of_the_system_are_raised():
    out = np.zeros((40, 512), np.uint8)
    with pytest.raises(OSError, match="descriptor") as caught:
        transfers.gather(-1, np.arange(0, 40 * 8192, 8192, dtype=np.uint64), 512, out, False)
    assert caught.value.errno == errno.EBADF


def test_nothing_to_read():
    assert transfers.gather(-1, np.empty(0, np.uint64), 512, np.empty((0, 512), np.uint8), True) == (0, 0)


@pytest.mark.parametrize(
    ("offsets", "row_bytes", "out"),
    [
        (np.zeros(2, np.int64), 512, np.zeros((2, 512), np.uint8)),
        (np.zeros(2, np.uint64), 512, np.zeros((1, 512), np.uint8)),
        (np.zeros(2, np.uint64), 0, np.zeros((2, 512), np.uint8)),
        (np.zeros(2, np.uint64), 1 << 20, np.zeros((2, 1 << 20), np.uint8)),
        (np.zeros(2, np.uint64), 512, np.zeros((4, 512), np.uint8)[::2]),
        (np.full(2, 2**63, np.uint64), 512, np.zeros((2, 512), np.uint8)),
    ],
)
def test_arguments_that_do_not_fit_are_refused(offsets, row_bytes, out):
    with pytest.raises(InvalidInput):
        transfers.gather(0, offsets, row_bytes, out, False)


def test_several_threads_gather_at_once(opened, content):
    fd, direct = opened
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            offsets = rng.integers(0, SIZE - 512, int(rng.integers(1, 80))).astype(np.uint64)
            out = np.zeros((offsets.size, 512), np.uint8)
            transfers.gather(fd, offsets, 512, out, direct)
            if not np.array_equal(out, rows_at(content, offsets, 512)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_gathers_too(path, content):
    fd = os.open(path, os.O_RDONLY)
    offsets = np.arange(0, 64 * 8192, 8192, dtype=np.uint64) % (SIZE - 512)
    out = np.zeros((64, 512), np.uint8)
    transfers.gather(fd, offsets, 512, out, False)
    child = os.fork()
    if child == 0:
        try:
            out[:] = 0
            transfers.gather(fd, offsets, 512, out, False)
            os._exit(0 if np.array_equal(out, rows_at(content, offsets, 512)) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(fd)


def test_a_punched_range_reads_as_zeros(tmp_path):
    path = tmp_path / "pool"
    path.write_bytes(b"x" * 16384)
    fd = os.open(path, os.O_RDWR)
    try:
        transfers.punch_hole(fd, 4096, 8192)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("this file system cannot punch holes")
    finally:
        os.close(fd)
    assert path.read_bytes() == b"x" * 4096 + bytes(8192) + b"x" * 4096
    with pytest.raises(OSError, match="descriptor"):
        transfers.punch_hole(-1, 0, 4096)
