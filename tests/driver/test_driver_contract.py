"""What every driver must do; a new driver adds itself to DRIVERS."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hillinfer_core.errors import ConfigError
from hillinferd.driver.contract import Driver
from hillinferd.driver.host import HEADER_BYTES, MAGIC, HostDriver

CAPACITY = 8 << 20
BASE = 64 << 10
ROW = 512

DRIVERS: dict[str, Callable[[Path], Driver]] = {
    "host-direct": lambda directory: HostDriver(directory / "pool", CAPACITY, keep_name=False),
    "host-buffered": lambda directory: HostDriver(
        directory / "pool", CAPACITY, keep_name=False, direct=False
    ),
}


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    opened = DRIVERS[request.param](tmp_path)
    yield opened
    opened.close()


def pages(count: int, seed: int = 0) -> np.ndarray:
    """Random bytes that begin on a page."""
    view = np.frombuffer(mmap.mmap(-1, count * 4096), np.uint8)
    view[:] = np.random.default_rng(seed).integers(0, 256, view.size, np.uint8)
    return view


def test_identity_and_health(driver: Driver) -> None:
    identity = driver.identify()
    assert identity.driver == "host"
    assert identity.capacity == CAPACITY
    driver.health()


def test_reads_back_what_was_written_at_any_alignment(driver: Driver) -> None:
    data = pages(600)
    driver.write(BASE, memoryview(data))
    for start, length in ((0, data.size), (1, 1), (4095, 2), (512, 4096), (777, 1 << 20), (4096, 8192)):
        out = np.zeros(length, np.uint8)
        assert driver.read(BASE + start, memoryview(out)) >= length
        np.testing.assert_array_equal(out, data[start : start + length])


def test_reads_into_a_page_aligned_buffer(driver: Driver) -> None:
    data, out = pages(64), pages(64, seed=1)
    driver.write(BASE, memoryview(data))
    assert driver.read(BASE, memoryview(out)) == data.size
    np.testing.assert_array_equal(out, data)


def test_gathers_scattered_rows_in_the_order_asked(driver: Driver) -> None:
    data = pages(256)
    driver.write(BASE, memoryview(data))
    rows = data.reshape(-1, ROW)
    wanted = np.random.default_rng(2).integers(0, len(rows), 700)
    out = np.zeros((len(wanted), ROW), np.uint8)
    read = driver.gather((BASE + wanted * ROW).astype(np.uint64), out)
    np.testing.assert_array_equal(out, rows[wanted])
    assert read > 0
    if driver.identify().direct_io:
        assert read % 4096 == 0
    assert driver.gather(np.empty(0, np.uint64), np.empty((0, ROW), np.uint8)) == 0


def test_discarded_ranges_can_be_written_again_and_neighbours_stay(driver: Driver) -> None:
    data = pages(48)
    driver.write(BASE, memoryview(data))
    driver.discard(BASE + (64 << 10), 64 << 10)
    out = np.zeros(64 << 10, np.uint8)
    driver.read(BASE, memoryview(out))
    np.testing.assert_array_equal(out, data[: 64 << 10])
    driver.read(BASE + (128 << 10), memoryview(out))
    np.testing.assert_array_equal(out, data[128 << 10 :])
    fresh = pages(16, seed=3)
    driver.write(BASE + (64 << 10), memoryview(fresh))
    driver.read(BASE + (64 << 10), memoryview(out))
    np.testing.assert_array_equal(out, fresh)


def test_nothing_reaches_beyond_the_capacity(driver: Driver) -> None:
    with pytest.raises(ValueError, match="capacity"):
        driver.write(CAPACITY - 4096, memoryview(pages(2)))
    with pytest.raises(ValueError, match="capacity"):
        driver.read(CAPACITY - 10, memoryview(bytearray(11)))
    with pytest.raises(ValueError, match="capacity"):
        driver.gather(np.array([CAPACITY - ROW + 1], np.uint64), np.zeros((1, ROW), np.uint8))
    with pytest.raises(ValueError, match="whole pages"):
        driver.write(BASE + 1, memoryview(pages(1)))


def test_a_file_without_a_name_leaves_nothing_behind(tmp_path: Path) -> None:
    driver = HostDriver(tmp_path / "pool", CAPACITY, keep_name=False)
    assert list(tmp_path.iterdir()) == []
    driver.close()


def test_discard_gives_space_back_to_the_file_system(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    driver = HostDriver(path, CAPACITY, keep_name=True)
    driver.write(BASE, memoryview(pages(512)))
    full = path.stat().st_blocks
    driver.discard(BASE, 2 << 20)
    assert path.stat().st_blocks < full
    assert path.stat().st_size == CAPACITY
    driver.close()


def test_a_named_file_is_used_again_but_never_another_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    HostDriver(path, CAPACITY, keep_name=True).close()
    assert path.stat().st_size == HEADER_BYTES
    assert path.read_bytes().startswith(MAGIC)
    driver = HostDriver(path, CAPACITY, keep_name=True)
    with pytest.raises(ConfigError, match="in use"):
        HostDriver(path, CAPACITY, keep_name=True)
    driver.close()

    for content in (b"a thesis", b"x" * 10_000):
        precious = tmp_path / "thesis"
        precious.write_bytes(content)
        with pytest.raises(ConfigError, match="not a cold pool"):
            HostDriver(precious, CAPACITY, keep_name=True)
        assert precious.read_bytes() == content
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="not a regular file"):
        HostDriver(tmp_path / "fifo", CAPACITY, keep_name=True)
