"""CEC's loader on the xrt driver and a fake pyxrt: from the catalogue to a card that is proved."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from xclbin_writer import SHELL
from xrt_rig import expected, opened, query, write_bitstream, write_keys

from hillinfer_core.errors import BadBitstream, DeviceUnavailable
from hillinfer_core.layout import Precision
from hillinferd.cec.catalogue import read_catalogue
from hillinferd.cec.configurations import SHIPPED
from hillinferd.cec.loader import Loader
from hillinferd.cec.xclbin import read_xclbin
from hillinferd.driver.contract import Scan
from hillinferd.driver.xrt import scan
from hillinferd.driver.xrt.driver import XrtDriver

NONE = {"bitstream": ""}


@pytest.fixture(autouse=True)
def _small_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "STREAM_BYTES", 16 << 10)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A catalogue of the shipped kernels, numbered from 1."""
    lines = ["version = 1"]
    for number, kernel in enumerate(SHIPPED, start=1):
        path = write_bitstream(tmp_path / f"{kernel.name}.xclbin", (kernel.name,), own=UUID(int=number))
        lines += [
            "[[bitstream]]",
            f'file = "{path.name}"',
            f'sha256 = "{hashlib.sha256(path.read_bytes()).hexdigest()}"',
            f'kernel = "{kernel.name}"',
            f'precision = "{kernel.precision}"',
            "head_dims = [8, 64, 256]",
            f'interface_uuid = "{SHELL}"',
        ]
    (tmp_path / "manifest.toml").write_text("\n".join(lines))
    return tmp_path / "manifest.toml"


def loader(driver: XrtDriver, manifest: Path) -> Loader:
    return Loader(driver, read_catalogue(manifest), manifest.parent / "state")


@pytest.mark.parametrize("p2p", [True, False], ids=["p2p", "bounce"])
def test_every_shipped_kernel_passes_its_self_test(tmp_path: Path, manifest: Path, p2p: bool) -> None:
    with opened(tmp_path, NONE, p2p=p2p) as driver:
        for number, kernel in enumerate(SHIPPED, start=1):
            status = loader(driver, manifest).load(kernel.name, 0)
            assert status.loaded == UUID(int=number)
        assert driver.fake.loads == [str(UUID(int=number)) for number in (1, 2, 3)]


def test_one_that_computes_wrongly_makes_way(tmp_path: Path, manifest: Path) -> None:
    with opened(tmp_path, NONE) as driver:
        used = loader(driver, manifest)
        used.load("evaluate_int8", 0)
        driver.fake.miscomputing.add(UUID(int=2))
        with pytest.raises(BadBitstream, match=r"evaluate_int4 does not .*int8\.xclbin is loaded again"):
            used.load("evaluate_int4", 0)
        segments, tiles = write_keys(driver, [64, 32], Precision.int8)
        wanted = Scan(segments, query(), 0, 96, 5)
        assert (driver.evaluate(wanted).ids == expected(tiles, Precision.int8, wanted)[0]).all()
        driver.fake.miscomputing.add(UUID(int=1))
        with pytest.raises(DeviceUnavailable, match=r"cannot be loaded again"):
            used.load("evaluate_int4", 0)
        # What failed is loaded, and not used.
        with pytest.raises(DeviceUnavailable, match="hillinferctl cec load"):
            driver.evaluate(wanted)


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """The collector never runs, as it may not between two bitstreams."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
def test_the_old_kernels_are_closed_before_another_bitstream(tmp_path: Path, manifest: Path) -> None:
    with opened(tmp_path, NONE) as driver:
        used = loader(driver, manifest)
        used.load("evaluate_int8", 0)
        assert driver.fake.open_kernels == 1
        used.load("evaluate_int4", 0)
        used.rollback(0)
        assert driver.fake.loads == [str(UUID(int=number)) for number in (1, 2, 1)]
        assert driver.fake.violations == []


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize(
    "fault",
    [{"miscomputing": {UUID(int=2)}}, {"torn": "blocks"}, {"end_state": 5}, {"memory": 32 << 10}],
    ids=lambda fault: next(iter(fault)),
)
def test_the_kernels_of_one_that_failed_are_closed_before_going_back(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch, fault: dict[str, object]
) -> None:
    with opened(tmp_path, NONE) as driver:
        used = loader(driver, manifest)
        used.load("evaluate_int8", 0)
        whole = {name: getattr(driver.fake, name) for name in fault}
        configure = driver.configure

        def with_fault(path: Path) -> None:
            for name, value in (fault if read_xclbin(path).uuid == UUID(int=2) else whole).items():
                setattr(driver.fake, name, value)
            configure(path)

        monkeypatch.setattr(driver, "configure", with_fault)
        with pytest.raises(BadBitstream, match=r"int8\.xclbin is loaded again"):
            used.load("evaluate_int4", 0)
        assert driver.fake.loads == [str(UUID(int=number)) for number in (1, 2, 1)]
        assert driver.fake.violations == []


def test_a_uuid_read_back_wrong(tmp_path: Path, manifest: Path) -> None:
    with opened(tmp_path, NONE) as driver:
        driver.fake.reports = UUID(int=9)
        with pytest.raises(BadBitstream, match=f"reports bitstream {UUID(int=9)}"):
            loader(driver, manifest).load("evaluate_int8", 0)
        driver.fake.reports = None
        assert loader(driver, manifest).status().good is None


def test_after_a_restart_of_the_process_and_of_the_machine(tmp_path: Path, manifest: Path) -> None:
    with opened(tmp_path, NONE) as driver:
        loader(driver, manifest).load("evaluate_int4", 0)
    # A new card in the rig is one without a bitstream, as after a cold start.
    with opened(tmp_path, {**NONE, "path": str(tmp_path / "again")}) as driver:
        assert loader(driver, manifest).restore().good_loaded
        assert driver.fake.loads == [str(UUID(int=2))]
        assert loader(driver, manifest).restore().good_loaded
        assert len(driver.fake.loads) == 1
