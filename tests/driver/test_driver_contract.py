"""What every driver must do; a new driver adds itself to DRIVERS."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xrt_rig import CheckedXrtDriver, plug
from xrt_rig import settings as xrt_settings

from hillinfer_core import reference
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Precision, tile_bytes
from hillinferd.driver.block import format_device
from hillinferd.driver.contract import DamagedKeys, Driver, KeySegment, Scan
from hillinferd.driver.host import HostDriver
from hillinferd.driver.settings import DriverSettings
from hillinferd.driver.storage import aligned

CAPACITY = 32 << 20
KEY_MEMORY = 8 << 20
BASE = 64 << 10
KEYS = 8 << 20
ROW = 512


@dataclass
class Place:
    """Opens a driver, again and again on the same pool; ``cleanup`` ends with the test."""

    open: Callable[[], Driver]
    keeps: bool = True


def host(path: Path, *, direct: bool = True, keep: bool = True, profile: str = "none") -> Place:
    wanted = DriverSettings("host", str(path), CAPACITY, keep, KEY_MEMORY, profile)
    return Place(lambda: HostDriver(wanted, direct=direct), keep)


def on_shm(directory: Path, cleanup: ExitStack) -> Place:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm")
    path = Path("/dev/shm") / f"hillinfer-test-{os.getpid()}"
    cleanup.callback(path.unlink, missing_ok=True)
    return host(path)


def on_loop(sector: int) -> Callable[[Path, ExitStack], Place]:
    def place(directory: Path, cleanup: ExitStack) -> Place:
        device = loop_device(directory, cleanup, sector)
        format_device(device)
        return host(device)

    return place


def xrt(p2p: bool) -> Callable[[Path, ExitStack], Place]:
    def place(directory: Path, cleanup: ExitStack) -> Place:
        plug(directory, p2p=p2p)
        wanted = xrt_settings(directory, capacity=CAPACITY, keep=True, key_memory=KEY_MEMORY)
        return Place(lambda: CheckedXrtDriver(wanted))

    return place


def loop_device(directory: Path, cleanup: ExitStack, sector: int = 512) -> Path:
    if os.geteuid() != 0 or not shutil.which("losetup") or not Path("/dev/loop-control").exists():
        pytest.skip("loop devices need root, losetup and /dev/loop-control")
    backing = directory / f"disk-{sector}"
    with backing.open("wb") as file:
        file.truncate(CAPACITY)
    command = ["losetup", "--find", "--show", "--sector-size", str(sector), str(backing)]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"losetup: {found.stderr.strip()}")
    device = found.stdout.strip()
    cleanup.callback(subprocess.run, ["losetup", "--detach", device], check=True)
    return Path(device)


DRIVERS: dict[str, Callable[[Path, ExitStack], Place]] = {
    "host-direct": lambda directory, _: host(directory / "pool"),
    "host-buffered": lambda directory, _: host(directory / "pool", direct=False),
    "host-volatile": lambda directory, _: host(directory / "pool", keep=False),
    "host-paced": lambda directory, _: host(directory / "pool", profile="smartssd"),
    "host-shm": on_shm,
    "host-loop-512": on_loop(512),
    "host-loop-4096": on_loop(4096),
    "xrt-p2p": xrt(p2p=True),
    "xrt-bounce": xrt(p2p=False),
}


@pytest.fixture(params=DRIVERS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as cleanup:
        yield DRIVERS[request.param](tmp_path, cleanup)


@pytest.fixture
def driver(place: Place) -> Iterator[Driver]:
    opened = place.open()
    yield opened
    opened.close()


def pages(count: int, seed: int = 0) -> np.ndarray:
    """Random bytes that begin on a page."""
    view = aligned(count * 4096)
    view[:] = np.random.default_rng(seed).integers(0, 256, view.size, np.uint8)
    return view


def test_identity_and_health(driver: Driver) -> None:
    identity = driver.identify()
    assert identity.capacity == CAPACITY
    assert identity.key_memory > 0
    assert identity.fresh
    assert len(identity.pool_id) == 36
    driver.health()


def test_reads_back_what_was_written_at_any_alignment(driver: Driver) -> None:
    data = pages(600)
    driver.write(BASE, memoryview(data))
    for start, length in (
        (0, data.size),
        (1, 1),
        (4095, 2),
        (512, 4096),
        (777, 1 << 20),
        (4096, 8192),
        (9, 0),
    ):
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
    driver.health()


def test_nothing_reaches_beyond_the_capacity(driver: Driver) -> None:
    with pytest.raises(ValueError, match="capacity"):
        driver.write(CAPACITY - 4096, memoryview(pages(2)))
    with pytest.raises(ValueError, match="capacity"):
        driver.read(CAPACITY - 10, memoryview(bytearray(11)))
    with pytest.raises(ValueError, match="capacity"):
        driver.gather(np.array([CAPACITY - ROW + 1], np.uint64), np.zeros((1, ROW), np.uint8))
    with pytest.raises(ValueError, match="capacity"):
        driver.discard(CAPACITY - 4096, 8192)
    with pytest.raises(ValueError, match="whole pages"):
        driver.write(BASE + 1, memoryview(pages(1)))
    with pytest.raises(ValueError, match="whole pages"):
        driver.discard(BASE + 1, 4096)


def test_a_pool_that_is_kept_is_the_same_when_opened_again(place: Place) -> None:
    if not place.keeps:
        return
    data = pages(16)
    driver = place.open()
    before = driver.identify()
    try:
        driver.write(BASE, memoryview(data))
        driver.flush()
    finally:
        driver.close()
    driver = place.open()
    try:
        identity = driver.identify()
        assert (identity.pool_id, identity.capacity) == (before.pool_id, before.capacity)
        assert not identity.fresh
        out = aligned(data.size)
        driver.read(BASE, memoryview(out))
        np.testing.assert_array_equal(out, data)
    finally:
        driver.close()


class Keys:
    """Segments of random evaluation keys, written to a driver's pool."""

    def __init__(
        self, driver: Driver, seed: int, lengths: list[int], precision: Precision, first: int = 0,
        *, heads: int = 2, dim: int = 16, few_levels: bool = False,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        self.tiles, self.segments = [], []
        offset, token = KEYS, first
        for tokens in lengths:
            shape = (heads, tokens // 16, tile_bytes(dim, precision))
            # Few levels: many tokens of equal score.
            tiles = rng.integers(0, 2 if few_levels else 256, shape, np.uint8)
            checksums = tuple(int(value) for value in reference.data_checksum(tiles))
            segment = KeySegment(offset, token, tokens, heads, dim, precision, checksums)
            assert segment.shape == shape
            padded = aligned(-(-segment.nbytes // 4096) * 4096)
            padded[: segment.nbytes] = tiles.reshape(-1)
            driver.write(offset, memoryview(padded))
            self.tiles.append(tiles)
            self.segments.append(segment)
            offset += padded.size + 4096
            token += tokens
        self.first, self.end = first, token
        self.precision = precision

    def winners(
        self, q: np.ndarray, first: int, end: int, k: int, offsets: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the reference selects."""
        tiles = np.concatenate(self.tiles, axis=1)
        scores = np.zeros((tiles.shape[0], tiles.shape[1] * 16), np.int32)
        reference.scores(tiles, q, self.precision, scores, offsets=offsets)
        return reference.top_k(scores[:, first - self.first : end - self.first], k, first)


def query(seed: int, heads: int = 2, vectors: int = 1, dim: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, (heads, vectors, dim)).astype(np.int8)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), precision=st.sampled_from(list(Precision)),
       tiles=st.lists(st.integers(1, 40), min_size=1, max_size=5), start=st.integers(0, 50),
       vectors=st.sampled_from([1, 3]), few_levels=st.booleans())  # fmt: skip
def test_evaluate_agrees_with_the_reference(
    driver: Driver, data, seed, precision, tiles, start, vectors, few_levels
) -> None:
    keys = Keys(driver, seed, [16 * n for n in tiles], precision, start * 16, few_levels=few_levels)
    first = data.draw(st.integers(keys.first, keys.end), "first")
    end = data.draw(st.integers(first, keys.end), "end")
    k = data.draw(st.integers(0, 60), "k")
    loaded = data.draw(st.sets(st.sampled_from(range(len(tiles)))), "loaded")
    for index in loaded:
        driver.load_keys(keys.segments[index], keys.tiles[index].copy())
    q = query(seed, vectors=vectors)
    offsets = np.random.default_rng(seed).integers(-20_000, 1, (2, vectors)).astype(np.int32)
    found = driver.evaluate(Scan(keys.segments, q, first, end, k, offsets=offsets))
    for segment in keys.segments:
        driver.unload_keys(segment.offset)
    ids, scores = keys.winners(q, first, end, k, offsets)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_array_equal(found.scores, scores)
    assert found.ids.dtype == np.uint32
    touched = [
        (index, item)
        for index, item in enumerate(keys.segments)
        if item.first_token < end and item.end_token > first
    ]
    if first < end:
        assert found.read == sum(item.nbytes for index, item in touched if index not in loaded)
        assert found.read <= found.scanned <= sum(item.nbytes for _, item in touched)


def test_histograms_of_query_heads_agree_with_the_reference_or_are_refused(driver: Driver) -> None:
    keys = Keys(driver, 1, [64, 32, 48], Precision.int8)
    driver.load_keys(keys.segments[1], keys.tiles[1].copy())
    q = np.random.default_rng(2).integers(-32767, 32768, (6, 1, 16)).astype(np.int16)
    if driver.identify().driver == "xrt":
        with pytest.raises(InvalidInput, match="min_mass"):
            driver.evaluate(Scan(keys.segments, q, 5, 130, 7, histogram=True))
        return
    for first, end in ((5, 130), (70, 70)):
        found = driver.evaluate(Scan(keys.segments, q, first, end, 7, histogram=True))
        right = reference.rank(keys.tiles, q, Precision.int8, first, end, 7, histogram=True)
        for field in ("ids", "scores", "histogram"):
            np.testing.assert_array_equal(getattr(found, field), getattr(right, field))


def test_loaded_keys_are_not_read_again_and_loading_replaces(driver: Driver) -> None:
    keys = Keys(driver, 1, [64, 64], Precision.int8)
    q = query(1)
    for segment, tiles in zip(keys.segments, keys.tiles, strict=True):
        driver.load_keys(segment, tiles.copy())
    assert driver.evaluate(Scan(keys.segments, q, 0, 128, 5)).read == 0
    held = driver.held_keys(keys.segments[1].offset)
    assert (held is not None) == (driver.identify().driver == "host" and driver.identify().profile == "none")
    if held is not None:
        np.testing.assert_array_equal(held, keys.tiles[1])
    other = np.zeros(keys.segments[0].shape, np.uint8)
    checksums = tuple(int(value) for value in reference.data_checksum(other))
    keys.tiles[0], keys.segments[0] = other, replace(keys.segments[0], checksums=checksums)
    driver.load_keys(keys.segments[0], other)
    ids, _ = keys.winners(q, 0, 128, 5)
    np.testing.assert_array_equal(driver.evaluate(Scan(keys.segments, q, 0, 128, 5)).ids, ids)
    driver.unload_keys(keys.segments[1].offset)
    driver.unload_keys(keys.segments[1].offset)
    assert driver.held_keys(keys.segments[1].offset) is None
    assert driver.evaluate(Scan(keys.segments, q, 0, 128, 5)).read == keys.segments[1].nbytes


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_changed_bit_of_streamed_keys_is_found(driver: Driver, which: int) -> None:
    keys = Keys(driver, 5, [256, 512, 64], Precision.int4)
    scan = Scan(keys.segments, query(5), 3, 820, 7)
    right = driver.evaluate(scan)
    segment = keys.segments[which]
    page = aligned(4096)
    driver.read(segment.offset, memoryview(page))
    page[segment.nbytes - 1 if segment.nbytes < 4096 else 777] ^= 4
    driver.write(segment.offset, memoryview(page))
    for _ in range(2):
        with pytest.raises(DamagedKeys) as caught:
            driver.evaluate(scan)
        assert caught.value.segment == segment
    # Those in memory are not those that are damaged, and the driver goes on.
    driver.load_keys(segment, keys.tiles[which])
    np.testing.assert_array_equal(driver.evaluate(scan).ids, right.ids)


def test_the_filling_of_the_last_page_is_no_part_of_the_keys(driver: Driver) -> None:
    keys = Keys(driver, 6, [64], Precision.int8)
    assert keys.segments[0].nbytes % 4096
    page = aligned(4096)
    driver.read(KEYS, memoryview(page))
    page[keys.segments[0].nbytes :] = 0xFF
    driver.write(KEYS, memoryview(page))
    assert driver.evaluate(Scan(keys.segments, query(6), 0, 64, 3)).ids.shape == (2, 3)


def test_more_keys_than_there_is_memory_for_are_scanned_from_the_pool(driver: Driver) -> None:
    tokens = KEY_MEMORY // 2 // 256 // 16 * 16
    keys = Keys(driver, 7, [tokens] * 3, Precision.int8, heads=1, dim=256)
    refused = 0
    for segment, tiles in zip(keys.segments, keys.tiles, strict=True):
        try:
            driver.load_keys(segment, tiles)
        except MemoryError:
            refused += 1
    if driver.identify().key_memory == KEY_MEMORY:
        assert refused == 1
    q = query(7, heads=1, dim=256)
    found = driver.evaluate(Scan(keys.segments, q, 0, keys.end, 30))
    ids, _ = keys.winners(q, 0, keys.end, 30)
    np.testing.assert_array_equal(found.ids, ids)
    assert found.read == refused * keys.segments[0].nbytes


def test_a_scan_of_tokens_without_keys_is_an_error(driver: Driver) -> None:
    keys = Keys(driver, 8, [64, 64], Precision.int8, 16)
    both = keys.segments
    for segments, first, end in ((both, 0, 20), (both, 100, 200), (both[1:], 60, 90), ([], 0, 1)):
        with pytest.raises(ValueError, match="no segment"):
            driver.evaluate(Scan(segments, query(8), first, end, 1))
    with pytest.raises(ValueError, match="tiles"):
        driver.load_keys(keys.segments[0], keys.tiles[0][:, 1:])
