"""Losing power at any moment: what was flushed before is there, byte for byte, beside torn later writes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from rig import MIB, Mapped, drive, pages, sectors, wipe
from write_log import Entry, Replay, entries

from hillinfer_core.errors import ConfigError, DamagedCatalogue
from hillinfer_core.layout import PAGE
from hillinferd.driver.block import format_device
from hillinferd.driver.storage import Storage, aligned

EXTENT = 64 << 10
EXTENTS = 48
TURNS = 30
LAST_MARK = "dm-log-writes-end"
"""Made by dm-log-writes itself when its device goes."""


@pytest.fixture
def logged() -> Iterator[Mapped]:
    """A drive whose every write is recorded; the drives of this test are blank."""
    cold, log, replay = (drive(name) for name in ("cold", "log", "replay"))
    for device in (cold, log, replay):
        wipe(device)
    with Mapped("logged", f"0 {sectors(cold)} log-writes {cold} {log}") as mapped:
        yield mapped


def recorded(mapped: Mapped) -> list[Entry]:
    """Return the log so far, which ends here."""
    mapped.load(f"0 {sectors(mapped.path)} zero")
    return list(entries(drive("log")))


def check(replay: Replay, expected: dict[int, np.ndarray], pool_id: str) -> None:
    """Open what was replayed as a daemon would, and compare the extents of ``expected``."""
    replay.sync()
    pool = Storage(drive("replay"), 0, keep=True)
    try:
        assert pool.pool_id == pool_id
        for offset, data in expected.items():
            out = aligned(data.size)
            pool.read(offset, memoryview(out))
            assert np.array_equal(out, data), f"extent at {offset} differs"
    finally:
        pool.close()


def test_what_was_flushed_before_power_was_lost_is_there_after_it(logged: Mapped) -> None:
    random = np.random.default_rng(5)
    pool_id = format_device(logged.path)
    pool = Storage(logged.path, 0, keep=True)
    held: dict[int, np.ndarray] = {}
    promises: dict[str, dict[int, np.ndarray]] = {}
    for turn in range(TURNS):
        for offset in MIB + EXTENT * random.choice(EXTENTS, int(random.integers(1, 6)), replace=False):
            if offset in held:
                del held[offset]
                pool.discard(int(offset), EXTENT)
            else:
                data = pages(EXTENT // PAGE, seed=int(random.integers(1 << 30)))
                pool.write(int(offset), memoryview(data))
                held[int(offset)] = data
        pool.flush()
        promises[f"flush-{turn}"] = dict(held)
        logged.message(f"mark flush-{turn}")
    pool.close()

    log = recorded(logged)
    marks = [index for index, entry in enumerate(log) if entry.mark]
    assert [log[index].mark for index in marks] == [*promises, LAST_MARK]
    replay, before = Replay(drive("replay")), 0
    for index, following in pairwise(marks):
        for entry in log[before:index]:
            replay.apply(entry)
        before = index
        promised = promises[log[index].mark]
        check(replay, promised, pool_id)
        # What comes next may have got there in part, in any order; the extents it aims at are not promised.
        later = log[index + 1 : following]
        touched = {(entry.offset - MIB) // EXTENT * EXTENT + MIB for entry in later if entry.length}
        for entry in random.permutation(np.array(later, object)):
            replay.apply_torn(entry, random)
        check(replay, {offset: data for offset, data in promised.items() if offset not in touched}, pool_id)
    replay.close()
    print(f"{len(log)} recorded requests, {len(promises)} flushes, each also with torn later writes")


def test_the_log_tells_flushed_from_unflushed(logged: Mapped) -> None:
    """The instrument itself: without the flush, the same check fails."""
    pool_id = format_device(logged.path)
    pool = Storage(logged.path, 0, keep=True)
    data = pages(16, seed=1)
    pool.write(MIB, memoryview(data))
    logged.message("mark unflushed")
    pool.flush()
    logged.message("mark flushed")
    pool.close()
    replay = Replay(drive("replay"))
    for entry in recorded(logged):
        replay.apply(entry)
        if entry.mark == "unflushed":
            with pytest.raises(AssertionError, match="differs"):
                check(replay, {MIB: data}, pool_id)
        if entry.mark == "flushed":
            check(replay, {MIB: data}, pool_id)
    replay.close()


def test_power_lost_while_formatting_leaves_a_pool_or_a_refusal(logged: Mapped) -> None:
    first = format_device(logged.path)
    pool = Storage(logged.path, 0, keep=True)
    pool.close()
    second = format_device(logged.path, force=True)
    Storage(logged.path, 0, keep=True).close()
    log = recorded(logged)
    seen: set[str] = set()
    replay = Replay(drive("replay"))
    random = np.random.default_rng(2)
    for entry in log:
        for torn in (True, False):
            if torn:
                replay.apply_torn(entry, random)
            else:
                replay.apply(entry)
            replay.sync()
            try:
                found = Storage(drive("replay"), 0, keep=True)
            except (ConfigError, DamagedCatalogue):
                seen.add("refused")
            else:
                seen.add(found.pool_id)
                found.close()
    replay.close()
    assert seen == {"refused", first, second}
