"""A file system that fills up under a sparse pool: ENOSPC, and what was written stays."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rig import MIB, pages, run

from hillinferd.driver.storage import Storage, aligned

CHUNK = 4 * MIB


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 48 MiB on a loop device."""
    image, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(48 * MIB)
    run("mkfs.ext4", "-q", image)
    run("mount", "-o", "loop", image, place)
    yield place
    run("umount", place)


def test_a_full_file_system_is_enospc_and_costs_nothing_that_was_written(small: Path) -> None:
    pool = Storage(small / "pool", 1 << 30, keep=True)
    written: list[int] = []
    data = pages(CHUNK // 4096, seed=1)

    def fill() -> None:
        for offset in range(MIB, 1 << 30, CHUNK):
            pool.write(offset, memoryview(data))
            written.append(offset)

    with pytest.raises(OSError, match="space") as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
    assert 4 < len(written) < 12
    pool.flush()
    pool.health()
    out = aligned(CHUNK)
    for offset in written:
        pool.read(offset, memoryview(out))
        np.testing.assert_array_equal(out, data)
    pool.discard(written[0], CHUNK)
    pool.discard(written[1], CHUNK)
    other = pages(CHUNK // 4096, seed=2)
    pool.write(written[1], memoryview(other))
    pool.read(written[1], memoryview(out))
    np.testing.assert_array_equal(out, other)
    pool.close()
