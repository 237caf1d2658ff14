"""Run under file_faults: a fault below every operation of a driver in turn, and what came of it as JSON."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hillinfer_core import kernel
from hillinfer_core.layout import Precision
from hillinferd.driver.contract import KeySegment, Scan
from hillinferd.driver.host import HostDriver
from hillinferd.driver.settings import DriverSettings
from hillinferd.driver.storage import aligned

CHUNKS = 4
NBYTES = CHUNKS * 512 << 10
BASE, NEW, KEYS = 64 << 10, 4 << 20, 8 << 20
FAULTS = {"EIO": "EIO", "ENOSPC": "ENOSPC", "torn": "EIO", "short": "done", "half": "done", "delay": "done"}
PLAN = Path(os.environ["HILLINFER_TEST_FAULTS"])


def plan(text: str) -> None:
    # A new file each time, so that the layer sees that it changed.
    fresh = PLAN.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(PLAN)


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def main(path: str, direct: bool) -> None:
    plan("none none 0")
    driver = HostDriver(DriverSettings("host", path, 32 << 20, True, 1 << 20), direct=direct)
    assert driver.identify().direct_io == direct
    old, new, out = aligned(NBYTES), aligned(NBYTES), aligned(NBYTES)
    old[:] = np.random.default_rng(0).integers(0, 256, NBYTES, np.uint8)
    new[:] = ~old
    driver.write(BASE, memoryview(old))
    tiles = np.random.default_rng(1).integers(0, 256, (2, 16, 256), np.uint8)
    keys = aligned(tiles.size)
    keys[:] = tiles.reshape(-1)
    driver.write(KEYS, memoryview(keys))
    sums = tuple(kernel.data_checksums(tiles).tolist())
    segment = KeySegment(KEYS, 0, 256, 2, 16, Precision.int8, sums)
    scan = Scan([segment], np.ones((2, 1, 16), np.int8), 0, 256, 4)
    ids = driver.evaluate(scan).ids
    picked = np.random.default_rng(2).permutation(NBYTES // 4096)[:100] * 4096 + 512
    rows = np.empty((100, 512), np.uint8)

    def written() -> bool:
        driver.read(NEW, memoryview(out))
        return np.array_equal(out, new)

    def has_read() -> bool:
        return np.array_equal(out, old)

    def gathered() -> bool:
        return np.array_equal(rows, old[picked[:, None] + np.arange(512)])

    operations: list[tuple[str, str, list[int], Callable[[], object], Callable[[], bool]]] = [
        ("write", "write", list(range(CHUNKS)), lambda: driver.write(NEW, memoryview(new)), written),
        ("read", "read", list(range(CHUNKS)), lambda: driver.read(BASE, memoryview(out)), has_read),
        ("gather", "read", [0, 7], lambda: driver.gather((BASE + picked).astype(np.uint64), rows), gathered),
        ("evaluate", "read", [0], lambda: driver.evaluate(scan), lambda: True),
    ]
    report: list[list[object]] = []

    def expect(
        name: str, fault: str, expected: str, call: Callable[[], object], right: Callable[[], bool]
    ) -> None:
        result = outcome(call)
        plan("none none 0")
        correct = result != "done" or right()
        # Nothing else is disturbed: what was there is there, and the driver goes on.
        out[:] = 0
        driver.read(BASE, memoryview(out))
        intact = np.array_equal(out, old) and np.array_equal(driver.evaluate(scan).ids, ids)
        driver.health()
        report.append([name, fault, expected, result, correct, intact])

    for name, kind, places, call, right in operations:
        for fault, expected in FAULTS.items():
            for at in places:
                new += 1
                out[:], rows[:] = 0, 0
                plan(f"{kind} {fault} {at}")
                expect(name, fault, expected, call, right)
    for name, kind, call in (("health", "read", driver.health), ("flush", "flush", driver.flush)):
        plan(f"{kind} EIO 0")
        expect(name, "EIO", "EIO", call, lambda: True)
    driver.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "direct")
