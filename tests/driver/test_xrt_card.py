"""What can be wrong with a card, its runtime or its bitstream, and what the user is told."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from uuid import UUID

import fake_pyxrt
import pytest
from xrt_rig import BDF, BOTH, expected, opened, plug, query, settings, write_bitstream, write_keys

from hillinfer_core.errors import BadBitstream, ConfigError, DeviceUnavailable
from hillinfer_core.layout import Precision
from hillinferd.driver.contract import Scan
from hillinferd.driver.xrt import card, launch, scan
from hillinferd.driver.xrt import driver as xrt_driver
from hillinferd.driver.xrt.driver import XrtDriver

OTHER_SHELL = UUID(int=5)


@pytest.fixture(autouse=True)
def _small_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "STREAM_BYTES", 16 << 10)
    monkeypatch.setattr(launch, "DEADLINE_S", 0.05)


def test_without_xrt_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug(tmp_path)
    monkeypatch.setitem(sys.modules, "pyxrt", None)
    with pytest.raises(DeviceUnavailable, match=r"pyxrt cannot be imported.*install XRT.*setup.sh"):
        XrtDriver(settings(tmp_path))


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ({"open_error": "mmap: no iomem"}, r'Above 4G decoding" in the BIOS.*warm'),
        ({"open_error": "open: Permission denied"}, "usermod -aG render"),
        ({"open_error": "exclusive access conflict"}, f"another process.*-d {BDF}"),
        ({"open_error": "something odd"}, f"xbutil examine -d {BDF}.*xbutil reset"),
        ({"gone": True}, "the card is gone"),
        ({"name": "xilinx_u2"}, "shell is not flashed; run `xbmgmt program --base"),
        ({"load_error": "device busy"}, "another process uses the card"),
        ({"sync_error": True}, "copying .* bytes failed"),
        ({"memory": 20 << 10}, "no room for"),
    ],
)
def test_a_card_that_cannot_be_opened(tmp_path: Path, faults: dict[str, object], says: str) -> None:
    plug(tmp_path, **faults)
    with pytest.raises(DeviceUnavailable, match=says):
        XrtDriver(settings(tmp_path))
    # It has let go of the pool: it opens again once the card is well.
    with opened(tmp_path, {"path": str(tmp_path / "again")}):
        pass


def test_no_card_or_another(tmp_path: Path) -> None:
    plug(tmp_path)
    with pytest.raises(DeviceUnavailable, match="no card is named"):
        XrtDriver(settings(tmp_path, card=""))
    fake_pyxrt.CARDS["0000:01:00.1"] = fake_pyxrt.FakeCard(open_error="Could not open device")
    with pytest.raises(DeviceUnavailable, match="xbutil examine"):
        XrtDriver(settings(tmp_path, card="0000:01:00.1"))


def test_a_drive_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug(tmp_path)
    monkeypatch.setattr(xrt_driver, "is_block_device", lambda path: True)
    monkeypatch.setattr(xrt_driver.os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="usermod -aG disk"):
        XrtDriver(settings(tmp_path))


def test_a_bitstream_is_compared_before_and_after_it_is_loaded(tmp_path: Path) -> None:
    fake = plug(tmp_path, shell=OTHER_SHELL)
    with pytest.raises(BadBitstream, match=f"the card has {OTHER_SHELL}"):
        XrtDriver(settings(tmp_path))
    assert fake.loads == []
    (tmp_path / "junk.xclbin").write_bytes(b"xclbin2\0" + bytes(500))
    with pytest.raises(BadBitstream, match="not a usable xclbin"):
        XrtDriver(settings(tmp_path, bitstream=str(tmp_path / "junk.xclbin"), path=str(tmp_path / "b")))
    assert fake.loads == []
    fake = plug(tmp_path, reports=UUID(int=77))
    with pytest.raises(BadBitstream, match="reports bitstream 00000000-0000-0000-0000-00000000004d"):
        XrtDriver(settings(tmp_path, path=str(tmp_path / "c")))
    assert len(fake.loads) == 1


def test_the_shells_that_sysfs_lists_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / BDF).mkdir()
    (tmp_path / BDF / "interface_uuids").write_text(f"{OTHER_SHELL.hex}\n{fake_pyxrt.SHELL.hex}\n")
    monkeypatch.setattr(card, "SYSFS", tmp_path)
    with opened(tmp_path) as driver:
        assert driver.interface_uuids() == [fake_pyxrt.SHELL, OTHER_SHELL]


def test_a_bitstream_that_is_loaded_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as driver:
        fake = driver.fake
        assert len(fake.loads) == 1
        driver.configure(tmp_path / "both.xclbin")
        assert len(fake.loads) == 1
        other = write_bitstream(tmp_path / "int8.xclbin", BOTH[:1], own=UUID(int=8))
        segments, tiles = write_keys(driver, [64], Precision.int8)
        driver.load_keys(segments[0], tiles)
        driver.configure(other)
        assert driver.loaded_uuid() == UUID(int=8)
        found = driver.evaluate(Scan(segments, query(), 0, 64, 5))
        assert found.read == segments[0].nbytes  # what was loaded went with the other bitstream


def test_without_a_bitstream_rows_are_stored_and_scans_say_what_to_do(tmp_path: Path) -> None:
    with opened(tmp_path, {"bitstream": ""}) as driver:
        driver.health()
        assert driver.loaded_uuid() is None
        segments, tiles = write_keys(driver, [64], Precision.int8)
        with pytest.raises(MemoryError):
            driver.load_keys(segments[0], tiles)
        driver.unload_keys(segments[0].offset)
        with pytest.raises(DeviceUnavailable, match="hillinferctl cec load"):
            driver.evaluate(Scan(segments, query(), 0, 64, 5))
        driver.configure(tmp_path / "both.xclbin")
        driver.evaluate(Scan(segments, query(), 0, 64, 5))


def test_a_precision_that_the_bitstream_lacks(tmp_path: Path) -> None:
    with opened(tmp_path, {"bitstream": ""}) as driver:
        driver.configure(write_bitstream(tmp_path / "int8.xclbin", BOTH[:1]))
        segments, _ = write_keys(driver, [64], Precision.int4)
        with pytest.raises(DeviceUnavailable, match=r"no kernel evaluate_int4 \(it has .*int8\).*cec load"):
            driver.evaluate(Scan(segments, query(), 0, 64, 5))
        with pytest.raises(DeviceUnavailable, match="no evaluation kernel"):
            driver.configure(write_bitstream(tmp_path / "none.xclbin", ("other",), own=UUID(int=9)))


def test_p2p_that_is_off_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), opened(tmp_path, p2p=False):
        pass
    (record,) = caplog.records
    for word in ("Above 4G decoding", "BIOS", "IOMMU", "xbutil configure --p2p enable", "p2p_enable", BDF):
        assert word in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.WARNING), opened(tmp_path):
        pass
    assert not caplog.records


def test_p2p_that_reads_something_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # As behind an IOMMU that sends the drive's writes elsewhere.
    monkeypatch.setattr(xrt_driver.Reader, "fill", lambda self, view, offset: None)
    with opened(tmp_path) as driver:
        assert not driver._scanner.p2p
    assert "not what the drive holds" in caplog.text


def test_a_slow_kernel_is_waited_for(tmp_path: Path) -> None:
    with opened(tmp_path, slow=20) as driver:
        segments, tiles = write_keys(driver, [64, 64], Precision.int8)
        wanted = Scan(segments, query(), 0, 128, 5)
        assert (driver.evaluate(wanted).ids == expected(tiles, Precision.int8, wanted)[0]).all()


def test_a_kernel_that_hangs_takes_the_card_out_of_service(tmp_path: Path) -> None:
    with opened(tmp_path) as driver:
        segments, _ = write_keys(driver, [64] * 5, Precision.int8)
        driver.fake.hang = True
        wanted = Scan(segments, query(), 0, 320, 5)
        for _ in range(2):
            with pytest.raises(DeviceUnavailable, match=f"has not ended.*xbutil reset -d {BDF}"):
                driver.evaluate(wanted)
        runs = driver.fake.runs
        with pytest.raises(DeviceUnavailable, match="has not ended"):
            driver.health()
        with pytest.raises(DeviceUnavailable, match="has not ended"):
            driver.configure(tmp_path / "both.xclbin")
        driver.release()
        with pytest.raises(DeviceUnavailable, match="has not ended"):
            driver.evaluate(wanted)
        assert driver.fake.runs == runs
        driver.fake.flight.clear()


@pytest.mark.parametrize("state", [5, 6, 8, 9])
def test_a_run_that_ends_badly(tmp_path: Path, state: int) -> None:
    with opened(tmp_path) as driver:
        segments, tiles = write_keys(driver, [64] * 4, Precision.int8)
        for index, segment in enumerate(segments):
            driver.load_keys(segment, tiles[:, 4 * index : 4 * index + 4])
        driver.fake.end_state = state
        with pytest.raises(DeviceUnavailable, match=f"state {state}; reset"):
            driver.evaluate(Scan(segments, query(), 0, 256, 5))
        assert driver.fake.most_in_flight == 4
        assert not driver.fake.flight  # whose buffers would be used again


def test_a_card_that_goes_away_or_off(tmp_path: Path) -> None:
    with opened(tmp_path) as driver:
        segments, _ = write_keys(driver, [64], Precision.int8)
        driver.fake.gone = True
        for call in (driver.health, lambda: driver.evaluate(Scan(segments, query(), 0, 64, 5))):
            with pytest.raises(DeviceUnavailable, match="the card is gone"):
                call()
        driver.fake.gone, driver.fake.offline = False, True
        with pytest.raises(DeviceUnavailable, match="100 C"):
            driver.health()
        driver.fake.offline, driver.fake.sync_error = False, True
        with pytest.raises(DeviceUnavailable, match="Input/output error"):
            driver.evaluate(Scan(segments, query(), 0, 64, 5))


# The fake is as the facts say.


def test_the_fake_skips_bad_arguments_of_a_call_and_refuses_them_of_set_arg(tmp_path: Path) -> None:
    with opened(tmp_path) as driver:
        device = fake_pyxrt.device(BDF)
        kernel = fake_pyxrt.kernel(device, device.get_xclbin_uuid(), "evaluate_int8")
        started = kernel("no", None, 1 << 40)
        assert int(started.state()) == 7
        assert int(started.state()) == 3
        assert int(started.state()) == 4
        assert driver.fake.violations.pop() == "a run was started without all of its arguments"
        run = fake_pyxrt.run(kernel)
        with pytest.raises(TypeError):
            run.set_arg(5, 1 << 31)
        with pytest.raises(IndexError):
            run.set_arg(14, 1)
        with pytest.raises(IndexError):
            kernel.group_id(9)
        with pytest.raises(IndexError):
            fake_pyxrt.bo(device, 4096, fake_pyxrt.bo.flags.normal, fake_pyxrt.GROUP + 1)
        with pytest.raises(MemoryError):
            fake_pyxrt.bo(device, 5 << 30, fake_pyxrt.bo.flags.normal, fake_pyxrt.GROUP)
        with pytest.raises(RuntimeError, match="uuid mismatch"):
            fake_pyxrt.kernel(device, fake_pyxrt.uuid(str(OTHER_SHELL)), "evaluate_int8")
        unread = fake_pyxrt.bo(device, 4096, fake_pyxrt.bo.flags.normal, fake_pyxrt.GROUP)
        with pytest.raises(RuntimeError, match="out of bounds"):
            unread.sync(fake_pyxrt.xclBOSyncDirection.XCL_BO_SYNC_BO_FROM_DEVICE, 8192, 0)
        unread.sync(fake_pyxrt.xclBOSyncDirection.XCL_BO_SYNC_BO_FROM_DEVICE, 64, 0)
        assert "ECC" in driver.fake.violations.pop()
        del unread, run, started, kernel
