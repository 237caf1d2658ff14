"""A pool on a whole NVMe drive: formatting, claiming it, and what the kernel sees of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rig import MIB, Mapped, drive, linear, pages, run, wipe

from hillinfer_core.errors import ConfigError, DamagedCatalogue
from hillinferd.driver.block import format_device
from hillinferd.driver.storage import Storage, aligned


@pytest.fixture(params=["cold", "wide"])
def device(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A drive with sectors of 512 bytes, and one with 4096."""
    path = drive(request.param)
    wipe(path)
    yield path
    wipe(path)


def test_a_formatted_drive_is_a_pool_of_its_whole_size_and_keeps_its_content(device: Path) -> None:
    name = format_device(device)
    with device.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
    pool = Storage(device, 0, keep=True)
    assert (pool.pool_id, pool.capacity, pool.fresh, pool.direct_io) == (name, size, True, True)
    data = pages(600, seed=1)
    pool.write(size - data.size, memoryview(data))
    pool.flush()
    pool.close()

    pool = Storage(device, 0, keep=True)
    assert (pool.pool_id, pool.capacity, pool.fresh) == (name, size, False)
    out = aligned(data.size)
    pool.read(size - data.size, memoryview(out))
    np.testing.assert_array_equal(out, data)
    with pytest.raises(ValueError, match="capacity"):
        pool.read(size - 1, memoryview(bytearray(2)))
    pool.close()


def test_a_drive_that_is_not_formatted_or_holds_something_else_is_refused(device: Path) -> None:
    with pytest.raises(ConfigError, match="hillinferctl format"):
        Storage(device, 0, keep=True)
    run("mkfs.ext4", "-q", device)
    with pytest.raises(ConfigError, match="not a cold pool"):
        Storage(device, 0, keep=True)
    with pytest.raises(ConfigError, match="--force"):
        format_device(device)
    with pytest.raises(ConfigError, match="block device"):
        Storage(device, 64 * MIB, keep=False)


def test_formatting_again_needs_force_and_takes_the_content_away(device: Path) -> None:
    first = format_device(device)
    pool = Storage(device, 0, keep=True)
    pool.write(MIB, memoryview(pages(16, seed=2)))
    pool.close()
    with pytest.raises(ConfigError, match="a cold pool"):
        format_device(device)
    second = format_device(device, force=True)
    assert second != first
    pool = Storage(device, 0, keep=True)
    out = np.ones(64 << 10, np.uint8)
    pool.read(MIB, memoryview(out))
    assert pool.fresh
    assert not out.any()
    pool.close()


def test_a_drive_in_use_is_refused_by_both(device: Path) -> None:
    format_device(device)
    pool = Storage(device, 0, keep=True)
    for attempt in (lambda: Storage(device, 0, keep=True), lambda: format_device(device, force=True)):
        with pytest.raises(ConfigError, match="in use"):
            attempt()
    with pytest.raises(AssertionError, match=r"busy|in use"):
        run("mount", device, "/mnt")
    pool.close()

    with Mapped("volume", linear(device)), pytest.raises(ConfigError, match="part of a volume"):
        Storage(device, 0, keep=True)

    run("mkfs.ext4", "-q", "-F", device)
    run("mount", device, "/mnt")
    with pytest.raises(ConfigError, match="mounted"):
        format_device(device, force=True)
    run("umount", "/mnt")


def test_discard_reaches_the_drive_and_spares_the_neighbours(device: Path) -> None:
    format_device(device)
    pool = Storage(device, 0, keep=True)
    data = pages(768, seed=3)
    pool.write(MIB, memoryview(data))
    pool.flush()
    before = _discarded(device)
    pool.discard(2 * MIB, MIB)
    assert _discarded(device) == before + MIB // 512
    out = aligned(data.size)
    pool.read(MIB, memoryview(out))
    np.testing.assert_array_equal(out[:MIB], data[:MIB])
    assert not out[MIB : 2 * MIB].any()
    np.testing.assert_array_equal(out[2 * MIB :], data[2 * MIB :])
    pool.close()


def test_the_page_cache_stays_empty(device: Path) -> None:
    format_device(device)
    pool = Storage(device, 0, keep=True)
    data = pages(16 * MIB // 4096, seed=4)
    before = _cached()
    pool.write(MIB, memoryview(data))
    pool.flush()
    pool.read(MIB, memoryview(aligned(data.size)))
    rows = np.zeros((2000, 512), np.uint8)
    pool.gather((MIB + np.arange(2000) * 8192).astype(np.uint64), rows)
    np.testing.assert_array_equal(rows, data.reshape(-1, 8192)[:2000, :512])
    assert _cached() - before < MIB
    pool.close()


@pytest.mark.parametrize("byte", [0, 21, 40, 300, 509])
def test_a_flipped_bit_in_the_header_is_never_taken_for_a_pool(device: Path, byte: int) -> None:
    format_device(device)
    with device.open("r+b") as file:
        page = bytearray(file.read(4096))
        page[byte] ^= 16
        file.seek(0)
        file.write(page)
        os.fsync(file.fileno())
    with pytest.raises((ConfigError, DamagedCatalogue)):
        Storage(device, 0, keep=True)


def _discarded(device: Path) -> int:
    """Return the sectors discarded so far (Documentation/block/stat.rst, field 14)."""
    return int(Path("/sys/class/block", device.name, "stat").read_text().split()[13])


def _cached() -> int:
    """Return the bytes of block devices in the page cache."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["Buffers"].split()[0]) * 1024
