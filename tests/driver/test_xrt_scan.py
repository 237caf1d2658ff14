"""Scans of the xrt driver on a fake pyxrt, and that the fake sees what is left out."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from xrt_rig import expected, opened, query, write_keys

from hillinfer_core.errors import DeviceUnavailable, InvalidInput
from hillinfer_core.layout import Precision
from hillinferd.driver.contract import DamagedKeys, KeySegment, Scan
from hillinferd.driver.xrt import buffers, launch, scan, transfer
from hillinferd.driver.xrt.driver import XrtDriver

SMALL = [64, 16, 320, 48, 160]


@pytest.fixture(autouse=True)
def _small_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    # As few bytes as make every buffer grow in some test.
    monkeypatch.setattr(scan, "STREAM_BYTES", 16 << 10)


def check(driver: XrtDriver, segments: list[KeySegment], tiles: np.ndarray, **asked: object) -> None:
    wanted = Scan(segments, **{"q": query(), "first": 0, "end": segments[-1].end_token, "k": 20, **asked})
    winners = driver.evaluate(wanted)
    ids, scores = expected(tiles, segments[0].precision, wanted)
    np.testing.assert_array_equal(winners.ids, ids)
    np.testing.assert_array_equal(winners.scores, scores)
    assert winners.ids.dtype == np.uint32
    assert winners.scores.dtype == np.int32


@pytest.mark.parametrize("p2p", [True, False], ids=["p2p", "bounce"])
@pytest.mark.parametrize("precision", Precision)
def test_scans_agree_with_the_reference(tmp_path: Path, precision: Precision, p2p: bool) -> None:
    with opened(tmp_path, p2p=p2p) as driver:
        segments, tiles = write_keys(driver, SMALL, precision)
        check(driver, segments, tiles)
        check(driver, segments, tiles, q=query(vectors=8), k=1)
        check(driver, segments, tiles, first=70, end=401, k=500)
        check(driver, segments, tiles, first=99, end=100)
        check(driver, segments, tiles, first=448, end=608)
        for index in (1, 2):
            driver.load_keys(
                segments[index], tiles[:, segments[index].first_token // 16 :][:, : SMALL[index] // 16]
            )
        check(driver, segments, tiles, first=33, end=390)
        whole = driver.evaluate(Scan(segments, query(), 0, 608, 3))
        assert whole.scanned == sum(segment.nbytes for segment in segments)
        assert whole.read == sum(segments[index].nbytes for index in (0, 3, 4))
        assert driver.fake.most_in_flight > 1


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=24),
    st.sampled_from(list(Precision)),
    st.integers(1, 3),
    st.sampled_from([8, 24, 128]),
    st.integers(1, 200),
    st.data(),
)
@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_segments_any_range(
    tmp_path: Path,
    lengths: list[int],
    precision: Precision,
    heads: int,
    dim: int,
    k: int,
    data: st.DataObject,
) -> None:
    with opened(tmp_path) as driver:
        segments, tiles = write_keys(driver, [16 * tiles for tiles in lengths], precision, heads, dim)
        for segment in segments:
            if data.draw(st.booleans()):
                start = segment.first_token // 16
                driver.load_keys(segment, tiles[:, start : start + segment.tokens // 16])
        total = segments[-1].end_token
        first = data.draw(st.integers(0, total - 1))
        end = data.draw(st.integers(first + 1, total))
        check(driver, segments, tiles, q=query(heads, 2, dim), first=first, end=end, k=k)


def test_contexts_of_different_shape_share_the_card(tmp_path: Path) -> None:
    with opened(tmp_path) as driver:
        shapes = [(Precision.int8, 2, 64), (Precision.int4, 3, 24), (Precision.int4, 1, 256)]
        contexts = [
            write_keys(driver, SMALL, precision, heads, dim, seed, offset=(1 + seed) << 20)
            for seed, (precision, heads, dim) in enumerate(shapes)
        ]
        for segments, tiles in contexts:
            driver.load_keys(segments[0], tiles[:, :4])
        for _ in range(3):
            for (segments, tiles), (_, heads, dim) in zip(contexts, shapes, strict=True):
                check(driver, segments, tiles, q=query(heads, 2, dim), first=5)


def test_equal_scores_go_to_the_lowest_id_across_segments(tmp_path: Path) -> None:
    with opened(tmp_path) as driver:
        segments, tiles = write_keys(driver, SMALL, Precision.int8)
        check(driver, segments, tiles, q=np.zeros((2, 1, 64), np.int8), first=60, k=30)


def test_ids_beyond_the_int32_of_a_scalar(tmp_path: Path) -> None:
    with opened(tmp_path) as driver:
        segments, tiles = write_keys(driver, [64], Precision.int8)
        far = 3 << 30
        moved = KeySegment(**{**vars(segments[0]), "first_token": far})
        winners = driver.evaluate(Scan([moved], query(), far + 1, far + 60, 9))
        ids, _ = expected(tiles, Precision.int8, Scan(segments, query(), 1, 60, 9))
        np.testing.assert_array_equal(winners.ids, ids + np.uint32(far))


def test_an_empty_scan_finds_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as driver:
        segments, _ = write_keys(driver, [64], Precision.int8)
        assert driver.evaluate(Scan(segments, query(), 10, 10, 5)).ids.shape == (2, 0)
        assert driver.evaluate(Scan([], query(), 0, 0, 5)).scores.shape == (2, 0)


def test_what_the_kernel_does_not_take(tmp_path: Path) -> None:
    with opened(tmp_path) as driver:
        segments, _ = write_keys(driver, [64], Precision.int8)
        with pytest.raises(InvalidInput, match="reduction sum"):
            driver.evaluate(Scan(segments, query(vectors=9), 0, 64, 5))
        huge = KeySegment(65536, 0, 131_088, 1, 8, Precision.int4, (0,))
        with pytest.raises(InvalidInput, match="131072 tokens"):
            driver.evaluate(Scan([huge], query(1, 1, 8), 0, 64, 5))
        with pytest.raises(ValueError, match="no segment holds token 64"):
            driver.evaluate(Scan(segments, query(), 0, 65, 5))


@pytest.mark.parametrize("p2p", [True, False], ids=["p2p", "bounce"])
def test_damaged_keys_are_named_loaded_or_not(tmp_path: Path, p2p: bool) -> None:
    with opened(tmp_path, p2p=p2p) as driver:
        segments, tiles = write_keys(driver, SMALL, Precision.int4)
        bad = [KeySegment(**{**vars(segment), "checksums": (1, 2)}) for segment in segments[2:4]]
        listed = [*segments[:2], *bad, segments[4]]
        with pytest.raises(DamagedKeys) as raised:
            driver.evaluate(Scan(listed, query(), 0, 608, 5))
        assert raised.value.segment is bad[0]
        # A bit that turns in the card's memory: what is in the pool is still whole.
        driver.load_keys(segments[0], tiles[:, :4].copy())
        driver.fake.flipped_bits = 1
        with pytest.raises(DamagedKeys):
            driver.evaluate(Scan(segments[:1], query(), 0, 64, 5))
        check(driver, segments, tiles)


def test_a_drive_that_fails_leaves_the_card_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as driver:
        segments, tiles = write_keys(driver, SMALL, Precision.int8)
        real, calls = transfer.os.preadv, []

        def failing(fd: int, parts: list[memoryview], offset: int) -> int:
            calls.append(offset)
            if len(calls) == 4:
                raise OSError(errno.EIO, "Input/output error")
            return real(fd, parts, offset)

        with monkeypatch.context() as patched:
            patched.setattr(transfer.os, "preadv", failing)
            with pytest.raises(OSError, match="Input/output"):
                driver.evaluate(Scan(segments, query(), 0, 608, 5))
        assert not driver.fake.flight
        check(driver, segments, tiles)


def test_short_reads_are_continued_and_many_are_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, {"capacity": 16 << 20}) as driver:
        segments, tiles = write_keys(driver, [16384], Precision.int8, dim=128)
        real, lengths = transfer.os.preadv, []

        def short(fd: int, parts: list[memoryview], offset: int) -> int:
            lengths.append(len(parts[0]))
            with parts[0][: max(len(parts[0]) // 8192 * 4096, 5000)] as part:
                # Off a page, as a torn direct read may be.
                return real(fd, [part[: len(part) // 4096 * 4096]], offset) - (17 if len(part) > 8192 else 0)

        monkeypatch.setattr(transfer.os, "preadv", short)
        check(driver, segments, tiles, q=query(dim=128))
        assert lengths.count(128 << 10) == transfer.STREAMS


def load_many(driver: XrtDriver, segment: KeySegment, tiles: np.ndarray) -> None:
    for number in range(1, 1000):
        driver.load_keys(KeySegment(**{**vars(segment), "offset": number << 22}), tiles)


def test_keys_give_way_to_the_work_of_a_scan(tmp_path: Path) -> None:
    with opened(tmp_path, memory=1 << 20) as driver:
        segments, tiles = write_keys(driver, [1024, 4096, 1024], Precision.int8, dim=32)
        parts = np.split(tiles, [64, 320], axis=1)
        driver.load_keys(segments[0], parts[0])
        with pytest.raises(MemoryError):
            load_many(driver, segments[2], parts[2])
        full = driver._scanner.residency.used
        check(driver, segments, tiles, q=query(dim=32))
        check(driver, segments, tiles, q=query(dim=32), k=6000)
        assert 0 < driver._scanner.residency.used < full - (256 << 10)
        assert driver.fake.most_allocated <= 1 << 20
        # What was loaded first is still there.
        assert driver.evaluate(Scan(segments[:1], query(dim=32), 0, 1024, 5)).read == 0


def test_loading_replaces_and_unloading_gives_back(tmp_path: Path) -> None:
    with opened(tmp_path, {"key_memory": 16 << 10}) as driver:
        assert driver.identify().key_memory == 16 << 10
        segments, tiles = write_keys(driver, [64, 64], Precision.int8)
        before = driver.fake.allocated
        for _ in range(2):
            driver.load_keys(segments[0], tiles[:, :4])
            assert driver.fake.allocated == before + 8192
        driver.load_keys(segments[1], tiles[:, 4:])
        with pytest.raises(MemoryError):
            driver.load_keys(KeySegment(**{**vars(segments[1]), "offset": 1 << 20}), tiles[:, 4:])
        with pytest.raises(ValueError, match="not those"):
            driver.load_keys(segments[0], tiles)
        driver.unload_keys(segments[0].offset)
        driver.unload_keys(12345)
        assert driver.fake.allocated == before + 8192
        check(driver, segments, tiles)


# Without any one of these, the fake must notice.


def scan_once(tmp_path: Path, *, p2p: bool) -> list[str]:
    """Scan streamed and loaded keys; return what the card noted. Raises if results are wrong."""
    driver = None
    try:
        with opened(tmp_path, p2p=p2p) as driver:
            segments, tiles = write_keys(driver, SMALL, Precision.int8)
            driver.load_keys(segments[0], tiles[:, :4])
            for seed in (1, 2):
                check(driver, segments, tiles, q=query(seed=seed))
    except AssertionError:
        if driver is None or not driver.fake.violations:
            raise
    return driver.fake.violations


def test_nothing_is_noted_when_nothing_is_left_out(tmp_path: Path) -> None:
    assert scan_once(tmp_path, p2p=True) == scan_once(tmp_path, p2p=False) == []


@pytest.mark.parametrize("p2p", [True, False], ids=["p2p", "bounce"])
def test_a_missing_zeroing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, p2p: bool) -> None:
    monkeypatch.setattr(buffers, "zero", lambda buffer: None)
    assert any("ECC" in noted for noted in scan_once(tmp_path, p2p=p2p))


@pytest.mark.parametrize(
    ("method", "where"),
    [("to_card", "_put"), ("to_card", "_run_all"), ("to_card", "load"), ("from_card", "_result")],
)
def test_any_missing_sync_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, where: str
) -> None:
    real = getattr(buffers.Buffer, method)
    calls, left_out = 0, 0

    def lame(buffer: buffers.Buffer, length: int) -> None:
        nonlocal calls
        calls += sys._getframe(1).f_code.co_name == where
        if calls != left_out or sys._getframe(1).f_code.co_name != where:
            real(buffer, length)

    monkeypatch.setattr(buffers.Buffer, method, lame)
    assert scan_once(tmp_path, p2p=False) == []
    total = calls
    assert total > 0
    for left_out in range(1, total + 1):
        calls = 0
        try:
            noted = scan_once(tmp_path, p2p=False)
        except (AssertionError, DeviceUnavailable, DamagedKeys):
            continue
        assert noted, f"{method} in {where}, number {left_out} of {total}, may be left out"


@pytest.mark.parametrize("torn", ["blocks", "summaries"])
def test_a_torn_result_is_refused_not_taken_for_an_earlier_one(tmp_path: Path, torn: str) -> None:
    with opened(tmp_path) as driver:
        segments, tiles = write_keys(driver, SMALL, Precision.int8)
        for _ in range(2):  # the same query: what is left of it in memory would do
            check(driver, segments, tiles, k=60)
        driver.fake.torn = torn
        with pytest.raises(DeviceUnavailable, match=r"torn; try again.*xbutil reset"):
            driver.evaluate(Scan(segments, query(seed=9), 0, 608, 60))
        driver.fake.torn = ""
        check(driver, segments, tiles)


def test_a_missing_wait_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "wait", lambda run, card: None)
    with pytest.raises(DeviceUnavailable, match="torn"):
        scan_once(tmp_path, p2p=True)


def test_a_view_that_outlives_its_buffer_is_noticed(tmp_path: Path) -> None:
    views = []
    with pytest.raises(AssertionError, match="view outlives"), opened(tmp_path) as driver:
        views.append(driver._scanner._queries.buffer.view[:4])


def test_a_bad_argument_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = launch.Launch.scalars
    monkeypatch.setattr(launch.Launch, "scalars", lambda self: [*real(self)[:-1], 1 << 31])
    with opened(tmp_path) as driver:
        segments, _ = write_keys(driver, [64], Precision.int8)
        with pytest.raises(TypeError, match="int32"):
            driver.evaluate(Scan(segments, query(), 0, 64, 5))
