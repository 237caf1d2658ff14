"""What a daemon does when a drive is removed and when it is back, told by events that are made up."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
import pytest
from raw_client import RawClient, Refused, random_rows, wait_for
from service_thread import Served, drive_settings, served

from hillinfer_core.layout import DType, Precision, Shape
from hillinferd.discovery.model import Fpga, Namespace, SmartSsd
from hillinferd.discovery.udev import UdevUnavailable
from hillinferd.discovery.watch import Appeared, Disappeared, Event
from hillinferd.driver.settings import DriverSettings
from hillinferd.service.drive import Drive, DriveSettings
from hillinferd.service.hotplug import Hotplug

SHAPE = Shape(1, 2, 64, DType.float16, Precision.int4)
ROWS = random_rows(np.random.default_rng(3), SHAPE, 1024)


def namespace(node: str | Path, serial: str = "S1") -> Namespace:
    return Namespace(
        str(node), "model", serial, 1 << 30, 512, "", "", 0, Path("/sys/devices/x"), Path("/sys/x"), ()
    )


def card(address: str) -> SmartSsd:
    fpga = Fpga("", address, "", "xocl", "", True, "", (), "", None, None, (), (), "", ())
    return SmartSsd(fpga, None, None, ())


class Told:
    """A drive that only notes what it is told."""

    def __init__(self, path: str | Path, address: str = "") -> None:
        driver = DriverSettings("host", str(path), 0, keep=True, key_memory=0, card=address)
        self.settings = DriveSettings("cold", driver, None)
        self.heard: list[tuple[str, str]] = []

    def gone(self, reason: str) -> None:
        self.heard.append(("gone", reason))

    def back(self, path: str) -> None:
        self.heard.append(("back", path))

    def words(self) -> list[str]:
        heard, self.heard = self.heard, []
        return [word for word, _ in heard]


def told(drive: Told, *events: Event) -> Hotplug:
    hotplug = Hotplug([drive])  # type: ignore[list-item]
    for event in events:
        hotplug.handle(event)
    return hotplug


def test_only_the_drive_of_that_namespace_is_told() -> None:
    drive = Told("/dev/nvme1n1")
    for other in ("/dev/nvme1n2", "/dev/nvme11n1", "/dev/nvme1n11", "/dev/nvme0n1"):
        told(drive, Appeared(namespace(other)), Disappeared(namespace(other)), Appeared(namespace(other)))
    assert drive.heard == []
    told(drive, Disappeared(namespace("/dev/nvme1n1", "S7")))
    assert drive.heard == [("gone", "/dev/nvme1n1, serial S7, was removed")]


def test_a_partition_goes_with_its_drive() -> None:
    drive = Told("/dev/nvme1n1p2")
    here = namespace("/dev/nvme1n1")
    hotplug = told(drive, Appeared(here), Disappeared(here))
    assert drive.words() == ["back", "gone"]
    hotplug.handle(Appeared(namespace("/dev/nvme4n1")))
    assert drive.heard == [("back", "/dev/nvme4n1p2")]


def test_links_are_followed_as_they_are_when_the_drive_is_back(tmp_path: Path) -> None:
    link = tmp_path / "by-id"
    link.symlink_to("/dev/nvme91n1")
    drive = Told(link)
    here = namespace("/dev/nvme91n1")
    hotplug = told(drive, Appeared(here))
    drive.words()
    link.unlink()
    hotplug.handle(Disappeared(here))
    assert drive.words() == ["gone"]
    hotplug.handle(Appeared(namespace("/dev/nvme91n1", "another drive")))
    assert drive.heard == []
    link.symlink_to("/dev/nvme92n1")
    hotplug.handle(Appeared(namespace("/dev/nvme92n1")))
    assert drive.heard == [("back", str(link))]
    hotplug.handle(Disappeared(namespace("/dev/nvme92n1")))
    assert drive.words() == ["back", "gone"]


def test_a_drive_is_known_again_under_another_node_by_its_serial_number() -> None:
    drive = Told("/dev/nvme91n1")
    hotplug = told(drive, Appeared(namespace("/dev/nvme91n1")), Disappeared(namespace("/dev/nvme91n1")))
    drive.words()
    # Another namespace of the same drive, and another drive.
    hotplug.handle(Appeared(namespace("/dev/nvme92n2")))
    hotplug.handle(Appeared(namespace("/dev/nvme93n1", "S2")))
    assert drive.heard == []
    hotplug.handle(Appeared(namespace("/dev/nvme92n1")))
    assert drive.heard == [("back", "/dev/nvme92n1")]
    drive.words()
    # Its old name is another's now.
    hotplug.handle(Appeared(namespace("/dev/nvme91n1", "S2")))
    hotplug.handle(Disappeared(namespace("/dev/nvme91n1", "S2")))
    assert drive.heard == []
    hotplug.handle(Disappeared(namespace("/dev/nvme92n1")))
    assert drive.words() == ["gone"]


def test_namespaces_without_a_serial_number_are_not_mixed_up() -> None:
    drive = Told("/dev/nvme91n1")
    here = namespace("/dev/nvme91n1", "")
    hotplug = told(drive, Appeared(here), Disappeared(here))
    assert drive.words() == ["back", "gone"]
    hotplug.handle(Appeared(namespace("/dev/nvme92n1", "")))
    assert drive.heard == []
    hotplug.handle(Appeared(here))
    assert drive.words() == ["back"]


def test_a_drive_with_a_card_needs_both() -> None:
    drive, address = Told("/dev/nvme91n1", "0000:04:00.1"), "0000:04:00.1"
    here = namespace("/dev/nvme91n1")
    hotplug = told(drive, Appeared(here), Appeared(card(address)), Disappeared(card("0000:05:00.1")))
    assert drive.words() == ["back", "back"]
    hotplug.handle(Disappeared(card(address)))
    hotplug.handle(Disappeared(here))
    assert drive.words() == ["gone", "gone"]
    hotplug.handle(Appeared(here))
    assert drive.heard == []
    hotplug.handle(Appeared(card(address)))
    assert drive.words() == ["back"]


def test_without_udev_the_daemon_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def none() -> AsyncGenerator[Event]:
        raise UdevUnavailable("libudev is not installed")
        yield  # what makes it a generator

    asyncio.run(Hotplug([]).follow(none))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "no news of drives that come and go; each is tried again and again"
    ]


@pytest.fixture
def nodes(runtime_dir: Path) -> list[Path]:
    """Two pools, files that play the namespaces of the same name."""
    return [runtime_dir / "nvme1n1", runtime_dir / "nvme2n1"]


def fill(client: RawClient, name: str = "") -> int:
    context: int = client.open_named(SHAPE, durable_name=name).context_id if name else client.open(SHAPE)
    client.append(context, 0, 0, ROWS)
    return context


def check(client: RawClient, context: int) -> None:
    np.testing.assert_array_equal(client.fetch_range(context, SHAPE, 0, 100, 900), ROWS[:, 100:1000])


def follow(serving: Served) -> Hotplug:
    return Hotplug(serving.service.drives)


def drive_of(serving: Served, name: str) -> Drive:
    return next(drive for drive in serving.service.drives if drive.name == name)


def test_a_removed_drive_fails_its_contexts_and_serves_again_when_it_is_back(
    runtime_dir: Path, nodes: list[Path]
) -> None:
    drives = [drive_settings(name, node) for name, node in zip(("cold", "other"), nodes, strict=True)]
    with served(runtime_dir, *drives) as serving, RawClient(runtime_dir) as a, RawClient(runtime_dir) as b:
        hotplug = follow(serving)
        durable, volatile, saved, elsewhere = fill(a, "book"), fill(a), fill(a, "shelf"), fill(b)
        a.save(saved)
        a.close_context(saved)
        assert [drive.pool.used_bytes > 0 for drive in a.status().drives] == [True, True]
        cold = a.status().drives[0]
        gone = namespace(nodes[0])
        # Work is in flight and waits when the drive goes.
        os.kill(cold.device.worker_pid, signal.SIGSTOP)
        errors: list[tuple[str, str]] = []

        def work() -> None:
            try:
                check(a, durable)
            except Refused as error:
                errors.append((error.error, error.message))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_for(lambda: bool(drive_of(serving, "cold").queue._waiting), 60)
        check(b, elsewhere)
        serving.run(lambda: hotplug.handle(Disappeared(gone)))
        for thread in threads:
            thread.join(60)
        says = f"drive cold is gone ({nodes[0]}, serial S1, was removed)"
        assert [error for error, _ in errors] == ["DeviceUnavailable"] * 3
        assert all(message.startswith(says) for _, message in errors), errors
        # Nothing is tried, and the other drive serves, also who attaches now.
        now = a.status()
        assert [drive.state for drive in now.drives] == ["gone", "serving"]
        assert now.drives[0].reason == f"{nodes[0]}, serial S1, was removed"
        assert now.drives[0].device.worker_restarts == 0
        wait_for(lambda: a.status().drives[0].device.worker_pid == 0, 60)
        check(b, elsewhere)
        with RawClient(runtime_dir) as late:
            check(late, fill(late))
            for context, message in ((durable, says), (volatile, "was lost with drive cold: ")):
                with pytest.raises(Refused) as caught:
                    check(a, context)
                assert caught.value.error == "DeviceUnavailable"
                assert message in caught.value.message
            # A name that is there is not taken by another drive.
            with pytest.raises(Refused, match="drive cold is gone"):
                late.open_named(SHAPE, base_name="shelf")
            serving.run(lambda: hotplug.handle(Appeared(gone)))
            wait_for(lambda: a.status().drives[0].state == "serving", 60)
            assert a.status().drives[0].reason == ""
            check(a, durable)
            a.append(durable, 0, 1024, ROWS)
            with pytest.raises(Refused, match="was lost with drive cold"):
                check(a, volatile)
            a.close_context(volatile)
            check(late, late.open_named(SHAPE, base_name="shelf").context_id)
            check(b, elsewhere)


def test_another_pool_in_its_place_is_not_taken_for_it(runtime_dir: Path, nodes: list[Path]) -> None:
    drives = [drive_settings(name, node) for name, node in zip(("cold", "other"), nodes, strict=True)]
    with served(runtime_dir, *drives) as serving, RawClient(runtime_dir) as client:
        hotplug, here = follow(serving), namespace(nodes[0])
        context = fill(client, "book")
        serving.run(lambda: hotplug.handle(Appeared(here)))
        serving.run(lambda: hotplug.handle(Disappeared(here)))
        wait_for(lambda: client.status().drives[0].device.worker_pid == 0, 60)
        kept = nodes[0].rename(runtime_dir / "kept")
        serving.run(lambda: hotplug.handle(Appeared(namespace(nodes[0], "S2"))))
        wait_for(lambda: "is another pool than before" in client.status().drives[0].reason, 60)
        with pytest.raises(Refused, match="bring back the one that was"):
            check(client, context)
        # It comes back under another name.
        kept.rename(runtime_dir / "nvme7n1")
        serving.run(lambda: hotplug.handle(Appeared(namespace(runtime_dir / "nvme7n1", "S1"))))
        wait_for(lambda: client.status().drives[0].state == "serving", 60)
        assert client.status().drives[0].device.path == str(runtime_dir / "nvme7n1")
        check(client, context)
