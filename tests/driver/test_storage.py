"""What a pool on a file or a block device is, and what is refused as one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from hillinfer_core.errors import ConfigError, DamagedCatalogue, VersionMismatch
from hillinferd.driver import block, header, storage
from hillinferd.driver.block import format_device
from hillinferd.driver.header import HEADER_BYTES, MAGIC, Header
from hillinferd.driver.open import open_driver
from hillinferd.driver.settings import DriverSettings
from hillinferd.driver.storage import Storage, aligned

HERE = Path(__file__).parent
CAPACITY = 8 << 20
BASE = 64 << 10


def pages(count: int, seed: int = 0) -> np.ndarray:
    data = aligned(count * 4096)
    data[:] = np.random.default_rng(seed).integers(0, 256, data.size, np.uint8)
    return data


def kept(path: Path, capacity: int = CAPACITY) -> Storage:
    return Storage(path, capacity, keep=True)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A pool with some content, closed."""
    made = kept(tmp_path / "pool")
    made.write(BASE, memoryview(pages(8)))
    made.close()
    return tmp_path / "pool"


def content(opened: Storage) -> np.ndarray:
    out = aligned(8 * 4096)
    opened.read(BASE, memoryview(out))
    return out


def test_a_file_without_a_name_leaves_nothing_behind(tmp_path: Path) -> None:
    opened = Storage(tmp_path / "pool", CAPACITY, keep=False)
    assert list(tmp_path.iterdir()) == []
    assert opened.fresh
    opened.close()


def test_a_pool_that_is_not_kept_never_takes_one_that_is(pool: Path) -> None:
    before = pool.read_bytes()
    with pytest.raises(ConfigError, match="has content"):
        Storage(pool, CAPACITY, keep=False)
    assert pool.read_bytes() == before


def test_discard_gives_space_back_to_the_file_system(tmp_path: Path) -> None:
    opened = kept(tmp_path / "pool")
    opened.write(BASE, memoryview(pages(512)))
    full = opened.path.stat().st_blocks
    opened.discard(BASE, 2 << 20)
    assert opened.path.stat().st_blocks < full
    assert opened.path.stat().st_size == CAPACITY
    for offset, length in ((0, 4096), (BASE, 100)):
        with pytest.raises(ValueError, match="whole pages"):
            opened.discard(offset, length)
    opened.close()


def test_a_pool_grows_and_never_shrinks(pool: Path) -> None:
    for asked, expected in ((0, CAPACITY), (4 << 20, CAPACITY), (16 << 20, 16 << 20), (CAPACITY, 16 << 20)):
        opened = kept(pool, asked)
        assert (opened.capacity, opened.fresh) == (expected, False)
        np.testing.assert_array_equal(content(opened), pages(8))
        opened.write(opened.capacity - 4096, memoryview(pages(1)))
        opened.close()


@pytest.mark.parametrize("capacity", [0, 4096, 10_000])
def test_a_new_pool_needs_room(tmp_path: Path, capacity: int) -> None:
    with pytest.raises(ConfigError, match="give it a capacity"):
        kept(tmp_path / "pool", capacity)


def test_a_file_whose_making_was_interrupted_is_made_anew(tmp_path: Path) -> None:
    for size in (0, CAPACITY):
        path = tmp_path / f"pool-{size}"
        with path.open("wb") as file:
            file.truncate(size)
        opened = kept(path)
        assert opened.fresh
        opened.close()


def test_a_growth_that_was_interrupted_leaves_the_pool_as_it_was(pool: Path) -> None:
    os.truncate(pool, 2 * CAPACITY)
    opened = kept(pool)
    assert opened.capacity == CAPACITY
    np.testing.assert_array_equal(content(opened), pages(8))
    opened.close()


def test_one_pool_one_daemon(pool: Path) -> None:
    opened = kept(pool)
    for keep in (True, False):
        with pytest.raises(ConfigError, match="in use by another daemon"):
            Storage(pool, CAPACITY, keep=keep)
    opened.close()
    kept(pool).close()


@pytest.mark.parametrize("precious", [b"a thesis", b"x" * 10_000, bytes(10_000)])
def test_another_kind_of_file_is_never_touched(tmp_path: Path, precious: bytes) -> None:
    path = tmp_path / "thesis"
    path.write_bytes(precious)
    with pytest.raises(ConfigError, match="not a cold pool"):
        kept(path)
    with pytest.raises(ConfigError, match="has content"):
        Storage(path, CAPACITY, keep=False)
    assert path.read_bytes() == precious


def test_what_is_no_file_is_refused(tmp_path: Path, pool: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(pool)
    for path, message in (
        (tmp_path / "fifo", "neither a regular file nor a block device"),
        (tmp_path, "cannot be opened: Is a directory"),
        (tmp_path / "link", "cannot be opened"),
        (tmp_path / "none" / "pool", "cannot be opened: No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            kept(path)


@pytest.mark.parametrize("byte", [len(MAGIC), 24, 30, 40, 47, 100, 508, 511])
def test_any_change_of_the_header_is_damage(pool: Path, byte: int) -> None:
    with pool.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)
        file.seek(byte)
        file.write(bytes([old[0] ^ 1]))
    with pytest.raises(DamagedCatalogue, match="damaged; restore"):
        kept(pool)


@pytest.mark.parametrize("size", [len(MAGIC), 100, HEADER_BYTES, CAPACITY - 4096, CAPACITY - 1])
def test_a_pool_that_was_cut_is_damaged(pool: Path, size: int) -> None:
    os.truncate(pool, size)
    with pytest.raises(DamagedCatalogue, match="restore"):
        kept(pool)
    assert pool.stat().st_size == size


def test_a_pool_of_another_version_is_named(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "VERSION", header.VERSION + 1)
    with pytest.raises(VersionMismatch, match=f"format {header.VERSION - 1}, this hillinferd has format"):
        kept(pool)


def test_health_sees_that_the_header_changed(pool: Path) -> None:
    opened = kept(pool)
    opened.health()
    other = aligned(4096)
    other[:] = np.frombuffer(Header.new(CAPACITY).pack(), np.uint8)
    opened.write(0, memoryview(other))
    with pytest.raises(OSError, match="not what it was"):
        opened.health()
    opened.close()


def test_the_page_cache_stays_empty(tmp_path: Path) -> None:
    opened = kept(tmp_path / "pool")
    if not opened.direct_io:
        pytest.skip("this file system has no direct I/O")
    data = pages(512)
    opened.write(BASE, memoryview(data))
    out = np.empty(data.size - 3, np.uint8)
    opened.read(BASE + 1, memoryview(out))
    np.testing.assert_array_equal(out, data[1:-2])
    rows = np.empty((300, 512), np.uint8)
    offsets = np.random.default_rng(1).integers(0, data.size - 512, 300)
    opened.gather((BASE + offsets).astype(np.uint64), rows)
    np.testing.assert_array_equal(rows, np.stack([data[o : o + 512] for o in offsets]))
    opened.health()
    assert cached_bytes(opened.path) == 0
    # The measure itself sees what is read through the cache.
    opened.path.read_bytes()
    assert cached_bytes(opened.path) >= data.size
    opened.close()


def cached_bytes(path: Path) -> int:
    if not shutil.which("fincore"):
        pytest.skip("fincore (util-linux) is not installed")
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def no_flag(fd: int, command: int, *rest: int) -> int:
    if command == fcntl.F_SETFL and rest[0] & os.O_DIRECT:
        raise OSError(22, "Invalid argument")
    return REAL_FCNTL(fd, command, *rest)


REAL_FCNTL = fcntl.fcntl


@pytest.mark.parametrize("how", ["said", "refused", "late"])
def test_where_direct_io_does_not_work_bytes_go_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "said":
        monkeypatch.setattr(storage.transfers, "direct_alignment", lambda fd: (0, 0))
    elif how == "refused":
        monkeypatch.setattr(storage.fcntl, "fcntl", no_flag)
    else:
        real = storage.transfers.write_range

        def late(fd: int, offset: int, data: np.ndarray, direct: bool) -> None:
            if direct:
                raise OSError(22, "Invalid argument")
            real(fd, offset, data, direct)

        monkeypatch.setattr(storage.transfers, "write_range", late)
    opened = kept(tmp_path / "pool")
    assert not opened.direct_io
    assert not fcntl.fcntl(opened._fd, fcntl.F_GETFL) & os.O_DIRECT
    opened.write(BASE, memoryview(pages(8)))
    np.testing.assert_array_equal(content(opened), pages(8))
    opened.close()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Makes loop devices without any content."""
    with ExitStack() as cleanup:
        if os.geteuid() != 0 or not shutil.which("losetup") or not Path("/dev/loop-control").exists():
            pytest.skip("loop devices need root, losetup and /dev/loop-control")

        def make() -> Path:
            backing = tmp_path / "disk"
            with backing.open("wb") as file:
                file.truncate(CAPACITY)
            command = ["losetup", "--find", "--show", str(backing)]
            found = subprocess.run(command, capture_output=True, text=True)
            if found.returncode:
                pytest.skip(f"losetup: {found.stderr.strip()}")
            path = Path(found.stdout.strip())
            cleanup.callback(subprocess.run, ["losetup", "--detach", str(path)], check=True)
            return path

        yield make


def test_a_device_is_formatted_before_it_is_used(device: Callable[[], Path]) -> None:
    path = device()
    with pytest.raises(ConfigError, match=f"hillinferctl format {path}"):
        kept(path)
    pool_id = format_device(path)
    with pytest.raises(ConfigError, match="a cold pool on it"):
        format_device(path)
    with pytest.raises(ConfigError, match="always keeps"):
        Storage(path, 0, keep=False)
    opened = kept(path, 4 << 20)
    assert (opened.pool_id, opened.capacity, opened.fresh) == (pool_id, 4 << 20, True)
    opened.write(BASE, memoryview(pages(8)))
    with pytest.raises(ConfigError, match="in use"):
        kept(path, 0)
    with pytest.raises(ConfigError, match="in use"):
        format_device(path, force=True)
    opened.close()
    opened = kept(path, 0)
    assert (opened.pool_id, opened.capacity, opened.fresh) == (pool_id, CAPACITY, False)
    np.testing.assert_array_equal(content(opened), pages(8))
    opened.close()
    # More than the device has is no reason to refuse it.
    opened = kept(path, 2 * CAPACITY)
    assert opened.capacity == CAPACITY
    opened.discard(BASE, 8 * 4096)
    opened.close()
    assert format_device(path, force=True) != pool_id


def test_a_device_with_content_is_formatted_only_by_force(device: Callable[[], Path]) -> None:
    path = device()
    with path.open("r+b") as file:
        file.seek(60_000)
        file.write(b"x")
    with pytest.raises(ConfigError, match="--force"):
        format_device(path)
    with pytest.raises(ConfigError, match="format"):
        kept(path)
    format_device(path, force=True)
    kept(path).close()


@pytest.mark.parametrize(
    ("at", "mark"),
    [(0x10040, b"_BHRfS_M"), (CAPACITY - BASE, b"\xfc\x4e\x2b\xa9"), (CAPACITY - 1, b"x")],
)
def test_marks_beyond_the_first_pages_and_at_the_end_are_seen_and_taken_away(
    device: Callable[[], Path], at: int, mark: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = device()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(mark)
    with pytest.raises(ConfigError, match="content on it"):
        format_device(path)
    with path.open("rb") as file:
        file.seek(at)
        assert file.read(len(mark)) == mark

    def cannot(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(block, "discard_device", cannot)
    format_device(path, force=True)
    with path.open("rb") as file:
        file.seek(at)
        assert not any(file.read(len(mark)))
    kept(path).close()


@pytest.mark.parametrize("nbytes", [128 << 10, (1 << 20) + 512, (1 << 20) + 4096])
def test_a_device_smaller_than_what_is_looked_at_is_formatted(
    device: Callable[[], Path], nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "CAPACITY", nbytes)
    path = device()
    pool_id = format_device(path)
    opened = kept(path, 0)
    assert (opened.pool_id, opened.capacity) == (pool_id, nbytes // 4096 * 4096)
    opened.close()
    with path.open("r+b") as file:
        file.write(bytes(4096))
        file.seek(nbytes - 1)
        file.write(b"x")
    with pytest.raises(ConfigError, match="content on it"):
        format_device(path)


def test_a_mounted_device_is_never_formatted_or_used(device: Callable[[], Path], tmp_path: Path) -> None:
    if not shutil.which("mkfs.ext4"):
        pytest.skip("mkfs.ext4 (e2fsprogs) is not installed")
    path = device()
    subprocess.run(["mkfs.ext4", "-q", str(path)], check=True)
    with pytest.raises(ConfigError, match="not a cold pool"):
        kept(path)
    place = tmp_path / "mounted"
    place.mkdir()
    if subprocess.run(["mount", str(path), str(place)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for call in (lambda: format_device(path, force=True), lambda: kept(path)):
            with pytest.raises(ConfigError, match="mounted"):
                call()
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_device_of_large_sectors_is_refused(
    device: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = device(), block.fcntl.ioctl

    def ioctl(fd: int, request: int, data: bytes) -> bytes:
        return struct.pack("I", 8192) if request == 0x1268 else real(fd, request, data)

    monkeypatch.setattr(block.fcntl, "ioctl", ioctl)
    with pytest.raises(ConfigError, match="sectors of 8192 bytes"):
        format_device(path)


def test_only_devices_are_formatted(tmp_path: Path, pool: Path) -> None:
    for path in (pool, tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="not a block device"):
            format_device(path, force=True)


def test_an_unknown_kind_of_driver_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'tape' is not known"):
        open_driver(DriverSettings("tape", str(tmp_path / "pool"), CAPACITY, True, 0))
    with pytest.raises(ConfigError, match="'zip' is not known"):
        open_driver(DriverSettings("host", str(tmp_path / "pool"), CAPACITY, True, 0, "zip"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def fault_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("g++ is not installed")
    built = tmp_path_factory.mktemp("layer") / "file_faults.so"
    source = str(HERE / "file_faults.cpp")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", source, "-o", str(built), "-ldl"], check=True)
    return built


@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_faults_below_the_driver_end_in_oserror_and_disturb_nothing(
    tmp_path: Path, fault_layer: Path, mode: str
) -> None:
    environment = os.environ | {
        "LD_PRELOAD": str(fault_layer),
        "HILLINFER_TEST_FAULTS": str(tmp_path / "faults"),
    }
    command = [sys.executable, str(HERE / "faulty_driver.py"), str(tmp_path / "faulty-pool"), mode]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert len(report) == 6 * 11 + 2
    for what, fault, expected, result, right, intact in report:
        assert result == expected, (what, fault)
        assert right, (what, fault)
        assert intact, (what, fault)
