"""The model of a device's time; what a machine makes of it is for the benchmark."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from hillinferd.driver import pacing
from hillinferd.driver.pacing import Pacing
from hillinferd.driver.profiles import NONE, SMARTSSD, Profile, profile
from hillinferd.driver.storage import Storage, aligned

ROUND = Profile(
    "round", nand_read=4e6, nand_write=2e6, read_iops=100, latency=0.5, card_dram=16e6, kernel=8e6,
    host_read=3e6, host_write=5e6, p2p=1e6,
)  # fmt: skip


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times that were waited for, instead of waiting."""
    until: list[float] = []
    monkeypatch.setattr(pacing, "wait_until", until.append)
    return until


def test_a_transfer_takes_the_slower_of_nand_and_link_and_one_latency(waits: list[float]) -> None:
    model = Pacing(ROUND)
    model.append(100, 4_000_000)
    model.read(200, 6_000_000)
    assert waits == [100 + 2 + 0.5, 200 + 2 + 0.5]


def test_small_reads_are_limited_by_their_number_and_cost_whole_pages(waits: list[float]) -> None:
    model = Pacing(ROUND)
    model.read(0, 50 * 4096, 50)
    model.read(10, 512)
    assert waits == pytest.approx([50 / 100 + 0.5, 10 + 1 / 100 + 0.5])
    plain = Pacing(Profile("plain", nand_read=4096, smallest=4096))
    plain.read(100, 10, 3)
    assert waits[-1] == 100 + 3


def test_the_nand_is_shared_and_the_latency_is_not(waits: list[float]) -> None:
    model = Pacing(ROUND)
    model.append(100, 2_000_000)
    model.read(100, 3_000_000)
    model.evaluate(100, [(1_000_000, True)])
    assert waits == pytest.approx([101.5, 102.5, 103 + 0.5 + 1 / 8])


def test_keys_are_scanned_while_the_next_are_brought(waits: list[float]) -> None:
    model = Pacing(ROUND)
    model.evaluate(0, [(8_000_000, False)] * 2)
    model.evaluate(10, [(1_000_000, True)] * 3)
    # Brought while those in memory are scanned: only the last scan shows.
    model.evaluate(100, [(80_000_000, False), (2_000_000, True)])
    # A fast scan waits for what has not come yet.
    model.evaluate(200, [(2_000_000, True), (8_000_000, False)])
    assert waits == pytest.approx([2, 10 + 3.5 + 1 / 8, 100 + 10 + 2 / 8, 200 + 2.5 + 2 / 8 + 1])


def test_loading_keys_takes_the_link_alone(waits: list[float]) -> None:
    model = Pacing(ROUND)
    model.append(0, 2_000_000_000)
    model.load(1, 5_000_000)
    assert waits[-1] == 2


def test_no_profile_never_waits(waits: list[float], tmp_path: Path) -> None:
    model = Pacing(NONE)
    model.append(7, 1 << 40)
    model.read(7, 1 << 40, 1000)
    model.load(7, 1 << 40)
    model.evaluate(7, [(1 << 40, True), (1 << 40, False)])
    assert waits == [7, 7, 7, 7]


def test_the_smartssd_profile_is_that_of_the_facts() -> None:
    assert profile("smartssd") is SMARTSSD
    assert SMARTSSD.scan == 15.4e9
    assert (SMARTSSD.latency + 4096 / SMARTSSD.p2p) * 1e6 == pytest.approx(82, abs=1)


def test_a_wait_ends_at_its_time_and_not_before() -> None:
    for ahead in (-1, 0, 30e-6, 300e-6, 0.003):
        until = time.perf_counter() + ahead
        pacing.wait_until(until)
        assert time.perf_counter() >= until


def test_what_storage_moves_is_what_is_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    charged: list[tuple[object, ...]] = []
    model = Pacing(SMARTSSD)
    for name in ("append", "read"):
        monkeypatch.setattr(model, name, lambda started, *rest, name=name: charged.append((name, *rest)))
    storage = Storage(tmp_path / "pool", 1 << 20, keep=True, pacing=model)
    storage.write(65536, aligned(8192).data)
    storage.read(65536, aligned(8192).data)
    storage.read_ranges([(65536, aligned(4096).data), (73728, aligned(8192).data)])
    offsets = np.array([65536, 65536 + 512, 65536 + 40960], np.uint64)
    read = storage.gather(offsets, np.empty((3, 512), np.uint8))
    storage.close()
    assert charged == [("append", 8192), ("read", 8192, 1), ("read", 12288, 2), ("read", read, 2)]
