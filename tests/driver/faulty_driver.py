"""Run under file_faults: puts one fault below every operation of a driver in turn, and prints what came of it."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np

from hillinfer_core.layout import Precision
from hillinferd.driver.contract import KeySegment, Scan
from hillinferd.driver.host import HostDriver, key_checksums
from hillinferd.driver.settings import DriverSettings
from hillinferd.driver.storage import aligned

PAGES = 512  # 2 MiB: four chunks
CHUNKS = 4
BASE, NEW, KEYS = 64 << 10, 4 << 20, 8 << 20
FAULTS = Path(os.environ["HILLINFER_TEST_FAULTS"])


def set_fault(text: str) -> None:
    # A new file each time, so that the layer sees that it changed.
    fresh = FAULTS.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(FAULTS)


def outcome(call: object) -> str:
    try:
        call()  # type: ignore[operator]
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def main(path: str, direct: bool) -> None:
    set_fault("none none 0")
    driver = HostDriver(DriverSettings("host", path, 32 << 20, True, 1 << 20), direct=direct)
    assert driver.identify().direct_io == direct
    old = aligned(PAGES * 4096)
    old[:] = np.random.default_rng(0).integers(0, 256, old.size, np.uint8)
    new = aligned(old.size)
    new[:] = ~old
    driver.write(BASE, memoryview(old))
    tiles = np.random.default_rng(1).integers(0, 256, (2, 16, 256), np.uint8)
    sums = tuple(int(value) for value in key_checksums(tiles))
    segment = KeySegment(KEYS, 0, 256, 2, 16, Precision.int8, sums)
    page = aligned(8192)
    page[:] = tiles.reshape(-1)
    driver.write(KEYS, memoryview(page))
    scan = Scan([segment], np.ones((2, 1, 16), np.int8), 0, 256, 4)
    ids = driver.evaluate(scan).ids
    offsets = (BASE + np.random.default_rng(2).permutation(PAGES)[:100] * 4096 + 512).astype(np.uint64)
    rows = np.empty((100, 512), np.uint8)
    out = aligned(old.size)

    def expect(what: str, fault: str, number: str, at: int, call: object, check: object) -> None:
        set_fault(f"{what} {fault} {at}")
        result = outcome(call)
        set_fault("none none 0")
        right = bool(check()) if result == "done" else True  # type: ignore[operator]
        # Nothing else is disturbed: what was there is there, and the driver goes on.
        out[:] = 0
        driver.read(BASE, memoryview(out))
        intact = np.array_equal(out, old) and np.array_equal(driver.evaluate(scan).ids, ids)
        driver.health()
        report.append([what, fault, number, result, right, intact])

    def written() -> bool:
        driver.read(NEW, memoryview(out))
        return np.array_equal(out, new)

    def gathered() -> bool:
        wanted = (offsets - BASE).astype(np.int64)[:, None] + np.arange(512)
        return np.array_equal(rows, old[wanted])

    report: list[list[object]] = []
    for fault, number in (
        ("EIO", "EIO"),
        ("ENOSPC", "ENOSPC"),
        ("torn", "EIO"),
        ("short", "done"),
        ("half", "done"),
        ("delay", "done"),
    ):
        for at in range(CHUNKS):
            new[at] += 1
            expect("write", fault, number, at, lambda: driver.write(NEW, memoryview(new)), written)
    for fault, number in (
        ("EIO", "EIO"),
        ("torn", "EIO"),
        ("short", "done"),
        ("half", "done"),
        ("delay", "done"),
    ):
        for at in range(CHUNKS):
            out[:] = 0
            expect(
                "read",
                fault,
                number,
                at,
                lambda: driver.read(BASE, memoryview(out)),
                lambda: np.array_equal(out, old),
            )
        for at in (0, 7):
            rows[:] = 0
            expect("read", fault, number, at, lambda: driver.gather(offsets, rows), gathered)
        expect("read", fault, number, 0, lambda: driver.evaluate(scan), lambda: True)
    expect("read", "EIO", "EIO", 0, driver.health, lambda: True)
    expect("flush", "EIO", "EIO", 0, driver.flush, lambda: True)
    driver.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "direct")
