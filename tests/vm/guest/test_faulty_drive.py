"""Drives that fail, forget, alter and dawdle: an error or a checksum tells, and nothing else is disturbed."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rig import MIB, Mapped, bad_range, drive, flakey, linear, pages, slow, wipe

from hillinfer_core import kernel
from hillinfer_core.layout import PAGE, Precision, tile_bytes
from hillinferd.driver.block import format_device
from hillinferd.driver.contract import DamagedKeys, KeySegment, Scan
from hillinferd.driver.host import HostDriver
from hillinferd.driver.settings import DriverSettings
from hillinferd.driver.storage import Storage, aligned

ROW = 512
BASE = MIB
ROWS = 4096
DATA = pages(ROWS * ROW // PAGE, seed=7)
SUMS = kernel.row_checksums(DATA.reshape(ROWS, ROW))


@pytest.fixture
def device() -> Iterator[Path]:
    path = drive("cold")
    wipe(path)
    yield path
    wipe(path)


@pytest.fixture
def mapped(device: Path) -> Iterator[Mapped]:
    with Mapped("faulty", linear(device)) as mapped:
        yield mapped


@pytest.fixture
def pool(mapped: Mapped) -> Iterator[Storage]:
    """A pool with DATA at BASE, on a drive that is well so far."""
    format_device(mapped.path)
    storage = Storage(mapped.path, 0, keep=True)
    storage.write(BASE, memoryview(DATA))
    storage.flush()
    yield storage
    storage.close()


def fails(action: Callable[[], object]) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
        action()
    assert caught.value.errno == errno.EIO


def rows_of(pool: Storage, wanted: np.ndarray) -> np.ndarray:
    out = np.full((len(wanted), ROW), 0xA5, np.uint8)
    pool.gather((BASE + wanted * ROW).astype(np.uint64), out)
    return out


def whole(pool: Storage) -> np.ndarray:
    out = aligned(DATA.size)
    pool.read(BASE, memoryview(out))
    return out.reshape(ROWS, ROW)


def test_every_operation_on_a_failing_drive_is_an_error_and_it_works_again_when_the_drive_does(
    pool: Storage, mapped: Mapped, device: Path
) -> None:
    mapped.load(flakey(device))
    wanted = np.arange(0, ROWS, 9)
    for action in (
        pool.health,
        lambda: pool.read(BASE, memoryview(aligned(PAGE))),
        lambda: pool.read(BASE + 3, memoryview(bytearray(9))),
        lambda: pool.read(BASE, memoryview(aligned(DATA.size))),
        lambda: rows_of(pool, wanted),
        lambda: pool.write(8 * MIB, memoryview(DATA)),
    ):
        fails(action)
    mapped.load(linear(device))
    pool.health()
    np.testing.assert_array_equal(whole(pool).ravel(), DATA)
    np.testing.assert_array_equal(rows_of(pool, wanted), DATA.reshape(ROWS, ROW)[wanted])


def test_writes_that_fail_leave_what_can_still_be_read_alone(
    pool: Storage, mapped: Mapped, device: Path
) -> None:
    mapped.load(flakey(device, "error_writes"))
    fails(lambda: pool.write(8 * MIB, memoryview(DATA)))
    np.testing.assert_array_equal(whole(pool).ravel(), DATA)
    mapped.load(linear(device))
    pool.write(8 * MIB, memoryview(DATA))
    pool.flush()
    out = aligned(DATA.size)
    pool.read(8 * MIB, memoryview(out))
    np.testing.assert_array_equal(out, DATA)


def test_one_bad_range_costs_only_what_lies_in_it(pool: Storage, mapped: Mapped, device: Path) -> None:
    bad = slice(1000, 1064)
    mapped.load(bad_range(device, BASE + bad.start * ROW, (bad.stop - bad.start) * ROW))
    everything = np.arange(ROWS)
    # Rows share pages with the bad ones, and only these are out of reach under direct I/O.
    good = everything[(everything < bad.start - 8) | (everything >= bad.stop + 8)]
    np.testing.assert_array_equal(rows_of(pool, good), DATA.reshape(ROWS, ROW)[good])
    pool.health()
    fails(lambda: rows_of(pool, everything))
    fails(lambda: rows_of(pool, np.array([5, bad.start + 1, 4000])))
    fails(lambda: whole(pool))
    fails(lambda: pool.write(BASE, memoryview(DATA)))
    head = aligned(bad.start * ROW // PAGE * PAGE)
    pool.read(BASE, memoryview(head))
    np.testing.assert_array_equal(head, DATA[: head.size])


def test_writes_that_the_drive_acknowledged_and_dropped_fail_their_checksums(
    pool: Storage, mapped: Mapped, device: Path
) -> None:
    mapped.load(flakey(device, "drop_writes"))
    newer = pages(DATA.size // PAGE, seed=8)
    sums = kernel.row_checksums(newer.reshape(ROWS, ROW))
    pool.write(BASE, memoryview(newer))
    pool.flush()
    mapped.load(linear(device))
    found = whole(pool)
    np.testing.assert_array_equal(found.ravel(), DATA)
    assert (kernel.row_checksums(found) != sums).all()


def test_a_write_torn_at_any_sector_shows_in_exactly_the_rows_that_it_missed(
    pool: Storage, mapped: Mapped, device: Path
) -> None:
    newer = pages(DATA.size // PAGE, seed=9)
    sums = kernel.row_checksums(newer.reshape(ROWS, ROW))
    # Sectors of one chunk get there, the rest of the request fails: dm splits it at the bad range.
    torn = BASE + 1234 * ROW
    mapped.load(bad_range(device, torn, DATA.size - 1234 * ROW))
    fails(lambda: pool.write(BASE, memoryview(newer)))
    mapped.load(linear(device))
    found = whole(pool)
    is_new = (found == newer.reshape(ROWS, ROW)).all(axis=1)
    is_old = (found == DATA.reshape(ROWS, ROW)).all(axis=1)
    assert (is_new ^ is_old).all()
    assert is_new.any()
    assert is_old[1234:].all()
    np.testing.assert_array_equal(kernel.row_checksums(found) == sums, is_new)


@pytest.mark.parametrize("direction", ["r", "w"])
def test_every_row_with_a_byte_altered_on_its_way_fails_its_checksum_and_no_other_row(
    pool: Storage, mapped: Mapped, device: Path, direction: str
) -> None:
    damaged = 0
    for nth in (1, 77, 512, 513, 3000):
        mapped.load(flakey(device, f"corrupt_bio_byte {nth} {direction} 222 0"))
        if direction == "w":
            # A copy: Linux 6.1 alters the bytes in the writer's own memory.
            sent = aligned(DATA.size)
            sent[:] = DATA
            pool.write(BASE, memoryview(sent))
            pool.flush()
            mapped.load(linear(device))
        for found, sums, truth in (
            (whole(pool), SUMS, DATA.reshape(ROWS, ROW)),
            (rows_of(pool, np.arange(0, ROWS, 11)), SUMS[::11], DATA.reshape(ROWS, ROW)[::11]),
        ):
            altered = (found != truth).any(axis=1)
            np.testing.assert_array_equal(kernel.row_checksums(found) != sums, altered)
            damaged += int(altered.sum())
        if direction == "r":
            mapped.load(linear(device))
            np.testing.assert_array_equal(whole(pool).ravel(), DATA)
    print(f"rows altered and found: {damaged}")
    assert damaged > 0


def test_evaluation_keys_altered_on_their_way_are_found_before_they_rank_anything(
    mapped: Mapped, device: Path
) -> None:
    format_device(mapped.path)
    shape = (2, 64, tile_bytes(64, Precision.int8))
    driver = HostDriver(DriverSettings("host", str(mapped.path), 0, keep=True, key_memory=0))
    segments: list[KeySegment] = []
    for index in range(4):
        tiles = np.random.default_rng(index).integers(0, 256, shape, np.uint8)
        sums = tuple(kernel.data_checksums(tiles).tolist())
        segment = KeySegment(MIB * (1 + index), 1024 * index, 1024, 2, 64, Precision.int8, sums)
        padded = aligned(-(-tiles.nbytes // PAGE) * PAGE)
        padded[: tiles.nbytes] = tiles.ravel()
        driver.write(segment.offset, memoryview(padded))
        segments.append(segment)
    driver.flush()
    query = np.random.default_rng(9).integers(-127, 128, (2, 1, 64)).astype(np.int8)
    scan = Scan(segments, query, 0, 4096, 64)
    expected = driver.evaluate(scan)
    assert expected.read == sum(segment.nbytes for segment in segments)

    mapped.load(flakey(device, "corrupt_bio_byte 100 r 1 0"))
    with pytest.raises(DamagedKeys) as caught:
        driver.evaluate(scan)
    assert caught.value.segment in segments
    mapped.load(bad_range(device, segments[2].offset, PAGE))
    fails(lambda: driver.evaluate(scan))
    part = driver.evaluate(Scan(segments[:2], query, 0, 2048, 64))
    assert part.ids.shape == (2, 64)
    mapped.load(linear(device))
    again = driver.evaluate(scan)
    np.testing.assert_array_equal(again.ids, expected.ids)
    np.testing.assert_array_equal(again.scores, expected.scores)
    driver.close()


def test_a_slow_drive_gives_the_same_bytes(pool: Storage, mapped: Mapped, device: Path) -> None:
    mapped.load(slow(device, read_ms=40, write_ms=90))
    newer = pages(DATA.size // PAGE, seed=10)
    pool.write(8 * MIB, memoryview(newer))
    pool.flush()
    out = aligned(newer.size)
    pool.read(8 * MIB, memoryview(out))
    np.testing.assert_array_equal(out, newer)
    wanted = np.random.default_rng(1).integers(0, ROWS, 300)
    np.testing.assert_array_equal(rows_of(pool, wanted), DATA.reshape(ROWS, ROW)[wanted])


def test_periods_of_failure_under_load_never_give_wrong_bytes(
    pool: Storage, mapped: Mapped, device: Path
) -> None:
    stop = threading.Event()

    def misbehave() -> None:
        while not stop.is_set():
            mapped.load(flakey(device))
            stop.wait(0.05)
            mapped.load(linear(device))
            stop.wait(0.1)

    thread = threading.Thread(target=misbehave)
    thread.start()
    random = np.random.default_rng(11)
    right, errors = 0, list[int | None]()
    try:
        while right < 40 or len(errors) < 5:
            wanted = random.integers(0, ROWS, 200)
            try:
                found = rows_of(pool, wanted)
            except OSError as error:
                errors.append(error.errno)
            else:
                np.testing.assert_array_equal(found, DATA.reshape(ROWS, ROW)[wanted])
                right += 1
    finally:
        stop.set()
        thread.join()
    assert set(errors) == {errno.EIO}
    print(f"gathers right: {right}, failed with EIO: {len(errors)}")
