"""A drive that is pulled out and pushed in again, with the machine's real udev."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
from rig import MIB, ask_host, drive, pages, wait_for

from hillinferd.discovery.inventory import scan
from hillinferd.discovery.watch import Appeared, Disappeared, Event, watch
from hillinferd.driver.block import format_device
from hillinferd.driver.storage import Storage, aligned

SERIAL = "hillinfer-plug"
LINK = Path(f"/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_{SERIAL}")

GONE = (errno.EIO, errno.ENODEV, errno.ENXIO)
GONE_TEXT = "|".join(os.strerror(number) for number in GONE)


@pytest.fixture(autouse=True)
def empty_slot() -> Iterator[None]:
    assert not LINK.exists()
    yield
    if LINK.exists():
        pull()


def push() -> Path:
    ask_host("plug")
    wait_for("the drive appeared", LINK.exists)
    return drive("plug")


def pull() -> None:
    ask_host("unplug")
    wait_for("the drive went away", lambda: not LINK.exists())


async def next_about_plug(events: AsyncGenerator[Event, None]) -> Event:
    async for event in events:
        if getattr(event.device, "serial", "") == SERIAL:
            return event
    raise AssertionError("the watcher ended")


def test_the_watcher_sees_a_drive_come_and_go_and_come_back() -> None:
    async def scenario() -> list[Event]:
        seen: list[Event] = []
        async with aclosing(watch()) as events:
            there: set[str] = set()
            async for event in events:
                assert isinstance(event, Appeared)
                there.add(getattr(event.device, "serial", ""))
                if {"hillinfer-root", "hillinfer-cold", "hillinfer-wide"} <= there:
                    break
        async with aclosing(watch()) as events:
            for request in ("plug", "unplug", "plug", "unplug"):
                waiting = asyncio.ensure_future(next_about_plug(events))
                await asyncio.sleep(1)
                assert not waiting.done()
                await asyncio.to_thread(ask_host, request)
                seen.append(await asyncio.wait_for(waiting, 60))
        return seen

    seen = asyncio.run(scenario())
    assert [type(event) for event in seen] == [Appeared, Disappeared, Appeared, Disappeared]
    first, second = seen[0].device, seen[2].device
    assert first.size == second.size == 512 * MIB  # type: ignore[union-attr]
    assert first.usable  # type: ignore[union-attr]
    assert first.identity != second.identity
    wait_for("the link went away", lambda: not LINK.exists())


def test_the_inventory_knows_the_drives_and_why_one_cannot_be_used() -> None:
    found = {namespace.serial: namespace for namespace in scan().namespaces}
    assert {"hillinfer-root", "hillinfer-cold", "hillinfer-wide", "hillinfer-log"} <= set(found)
    assert found["hillinfer-wide"].block_size == 4096
    assert found["hillinfer-cold"].block_size == 512
    assert found["hillinfer-cold"].usable
    root = found["hillinfer-root"]
    assert not root.usable
    assert any(problem.blocks and problem.remedy for problem in root.problems)
    assert all(namespace.pci_address for namespace in found.values())


def test_a_pool_that_is_pulled_out_in_use_fails_and_is_whole_when_it_is_back() -> None:
    device = push()
    name = format_device(device, force=True)
    pool = Storage(device, 0, keep=True)
    data = pages(8 * MIB // 4096, seed=1)
    pool.write(MIB, memoryview(data))
    pool.flush()
    rows = data.reshape(-1, 512)
    right = threading.Event()
    outcome: list[OSError] = []

    def read_on() -> None:
        random = np.random.default_rng(2)
        out = np.empty((64, 512), np.uint8)
        try:
            while True:
                wanted = random.integers(0, len(rows), 64)
                pool.gather((MIB + wanted * 512).astype(np.uint64), out)
                np.testing.assert_array_equal(out, rows[wanted])
                right.set()
        except OSError as error:
            outcome.append(error)

    reader = threading.Thread(target=read_on, daemon=True)
    reader.start()
    assert right.wait(60)
    pull()
    reader.join(60)
    assert not reader.is_alive()
    assert [error.errno in GONE for error in outcome] == [True], outcome
    for attempt in (
        pool.health,
        lambda: pool.write(MIB, memoryview(data)),
        lambda: pool.read(MIB, memoryview(aligned(4096))),
        lambda: pool.discard(MIB, MIB),
    ):
        with pytest.raises(OSError, match=GONE_TEXT) as caught:
            attempt()
        assert caught.value.errno in GONE
    pool.close()

    device = push()
    pool = Storage(device, 0, keep=True)
    assert pool.pool_id == name
    assert not pool.fresh
    out = aligned(data.size)
    pool.read(MIB, memoryview(out))
    np.testing.assert_array_equal(out, data)
    pool.close()
