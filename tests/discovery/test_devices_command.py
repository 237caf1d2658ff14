"""The two commands as a user runs them: on this machine, and on machines that umockdev plays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine_tree as tree
import pytest

CTL = [sys.executable, "-m", "hillinferd.ctl"]
needs_umockdev = pytest.mark.skipif(not shutil.which("umockdev-run"), reason="umockdev is not installed")

CHECKS = [
    "daemon",
    "discovery",
    "card",
    "p2p",
    "above 4G",
    "iommu",
    "pcie link",
    "xrt",
    "render nodes",
    "namespaces",
    "direct I/O",
    "free space",
    "memory lock",
    "processor",
]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "160", **environment},
    )


def mocked(tmp_path: Path, devices: list[tree.Device], *command: str, **environment: str) -> Any:
    description = tmp_path / "machine.umockdev"
    description.write_text(tree.describe(devices))
    return run("umockdev-run", "-d", str(description), "--", *CTL, *command, **environment)


def checks_of(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    checks = json.loads(done.stdout)["checks"]
    assert [check["name"] for check in checks] == CHECKS
    for check in checks:
        assert set(check) == {"name", "verdict", "detail", "remedy"}
        assert check["verdict"] in {"ok", "warning", "failed", "not applicable"}
        assert check["detail"]
        assert bool(check["remedy"]) == (check["verdict"] in {"warning", "failed"})
    assert done.returncode == any(check["verdict"] == "failed" for check in checks)
    return {check["name"]: check for check in checks}


@needs_umockdev
def test_devices_of_a_machine_with_one_card(tmp_path: Path) -> None:
    done = mocked(tmp_path, tree.one_pair(), "devices", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    (space,), (card,) = shown["namespaces"], shown["smartssds"]
    assert space["node"] == card["namespace"] == "/dev/nvme0n1"
    assert space["size_bytes"] == 7501476528 * 512
    assert card["user"] == "0000:04:00.1"
    assert card["interface_uuids"] == [tree.INTERFACE_UUID]
    assert card["ready"] is card["p2p"] is card["usable"] is space["usable"] is True
    table = mocked(tmp_path, tree.one_pair(), "devices").stdout
    for part in ("/dev/nvme0n1", "0000:04:00.1", "/dev/dri/renderD129", "3.5 TiB", "8 GT/s x4"):
        assert part in table


@needs_umockdev
def test_devices_says_what_to_do_about_a_card_that_is_not_flashed(tmp_path: Path) -> None:
    done = mocked(tmp_path, tree.one_pair(flashed=False), "devices")
    assert "not flashed" in done.stdout
    assert "xbmgmt program --base --device 0000:04:00.0" in done.stdout


@needs_umockdev
def test_devices_of_two_cards_of_which_one_lacks_its_drive(tmp_path: Path) -> None:
    devices, first, second = tree.outer_switch()
    devices += [*tree.card(first, 0x20, None), *tree.card(second, 0x30, 1)]
    shown = json.loads(mocked(tmp_path, devices, "devices", "--json").stdout)
    assert [(card["address"], card["namespace"]) for card in shown["smartssds"]] == [
        ("0000:23:00.1", None),
        ("0000:33:00.1", "/dev/nvme1n1"),
    ]
    assert "lspci" in shown["smartssds"][0]["problems"][0]["remedy"]


@needs_umockdev
def test_devices_of_a_machine_with_nvme_only(tmp_path: Path) -> None:
    devices = tree.drive("pci0000:00/0000:00:02.0", 0, signature="crypto_LUKS")
    shown = json.loads(mocked(tmp_path, devices, "devices", "--json").stdout)
    assert shown["smartssds"] == []
    assert shown["namespaces"][0]["signature"] == "crypto_LUKS"


@needs_umockdev
def test_devices_of_an_empty_machine_names_what_works_without(tmp_path: Path) -> None:
    done = mocked(tmp_path, [tree.root_port()], "devices")
    assert done.returncode == 0
    assert "No NVMe drive and no SmartSSD" in done.stdout
    assert "--pool FILE" in done.stdout


@needs_umockdev
def test_doctor_with_a_healthy_card_and_xrt(tmp_path: Path) -> None:
    xrt = tmp_path / "xrt"
    xrt.mkdir()
    (xrt / "pyxrt.py").touch()
    (xrt / "version.json").write_text('{"BUILD_VERSION": "2.16.204"}')
    done = mocked(
        tmp_path, tree.one_pair(), "doctor", "--json", "--pool", str(tmp_path),
        PYTHONPATH=str(xrt), XILINX_XRT=str(xrt),
    )  # fmt: skip
    checks = checks_of(done)
    for name in ("card", "p2p", "above 4G", "iommu", "pcie link", "xrt", "render nodes"):
        assert checks[name]["verdict"] == "ok", checks[name]
    assert "2.16.204" in checks["xrt"]["detail"]


@needs_umockdev
def test_doctor_with_a_card_and_nothing_as_it_should_be(tmp_path: Path) -> None:
    slow = tree.link("2.5 GT/s PCIe", 1)
    devices = []
    for device in tree.one_pair(p2p=False, ready=False, uplink=slow):
        if device.path.endswith(":04:00.1"):
            group = "../" * (device.path.count("/") + 2) + "kernel/iommu_groups/7"
            device = tree.replace(device, links={**device.links, "iommu_group": group})
        devices.append(device)
    done = mocked(tmp_path, devices, "doctor", "--json", "--pool", str(tmp_path))
    assert done.returncode == 1
    checks = checks_of(done)
    expected = {
        "card": ("failed", "ready", "xbutil examine"),
        "p2p": ("warning", "P2P is off", "xbutil configure --p2p enable"),
        "above 4G": ("warning", "no BAR of 8 GB", "Above 4G decoding"),
        "iommu": ("warning", "IOMMU", "kernel's command line"),
        "pcie link": ("warning", "2.5 GT/s x1", "slot"),
        "xrt": ("failed", "pyxrt", "install XRT"),
    }
    for name, (verdict, detail, remedy) in expected.items():
        assert checks[name]["verdict"] == verdict, checks[name]
        assert detail in checks[name]["detail"]
        assert remedy in checks[name]["remedy"]


def test_devices_here() -> None:
    done = run(*CTL, "devices", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    real = {f"/dev/{path.name}" for path in Path("/sys/class/block").glob("nvme*n*") if "p" not in path.name}
    assert {space["node"] for space in shown["namespaces"]} == {n for n in real if "c" not in n}


def test_doctor_here(tmp_path: Path) -> None:
    done = run(*CTL, "doctor", "--json", "--pool", str(tmp_path / "new" / "pool"))
    checks = checks_of(done)
    assert checks["free space"]["verdict"] == "ok"
    assert str(tmp_path) in checks["free space"]["detail"]
    assert list(tmp_path.iterdir()) == []


def test_doctor_of_a_place_without_room_fails() -> None:
    done = run(*CTL, "doctor", "--pool", "/proc")
    assert done.returncode == 1
    for name in CHECKS:
        assert name in done.stdout
    assert "has room for 0 B" in done.stdout


def test_without_pyudev_devices_names_the_extra_and_doctor_goes_on(tmp_path: Path) -> None:
    (tmp_path / "pyudev.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'pyudev'\", name='pyudev')"
    )
    done = run(*CTL, "devices", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("hillinferctl: pyudev is not installed")
    assert "hillinfer[daemon]" in done.stderr
    assert done.stderr.count("\n") == 1
    checks = checks_of(run(*CTL, "doctor", "--json", "--pool", str(tmp_path), PYTHONPATH=str(tmp_path)))
    assert checks["discovery"]["verdict"] == "failed"
    assert "hillinfer[daemon]" in checks["discovery"]["detail"]
    assert checks["card"]["verdict"] == "not applicable"
    assert checks["direct I/O"]["verdict"] in {"ok", "warning"}


def test_without_libudev_the_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "pyudev.py").write_text("def Context():\n    raise ImportError('No library named udev')\n")
    done = run(*CTL, "devices", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "apt-get install libudev1" in done.stderr
    assert done.stderr.count("\n") == 1
