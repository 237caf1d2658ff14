"""What events mean, without udev and without waiting."""

from __future__ import annotations

from pathlib import Path

import machine_tree as tree
import pytest

from hillinferd.discovery.inventory import inventory_of
from hillinferd.discovery.model import Inventory, Namespace
from hillinferd.discovery.nvme import Usage
from hillinferd.discovery.udev import Change
from hillinferd.discovery.watch import Appeared, Event, Tracker


class Bench:
    """A tracker over a machine that can be changed, at a time that can be set."""

    def __init__(self, tmp_path: Path) -> None:
        self._tmp_path, self._times = tmp_path, 0
        self.now, self.looks, self.inventory = 0.0, 0, Inventory()
        self.tracker = Tracker(self._look, ready_within_s=10.0, clock=lambda: self.now)

    def _look(self) -> Inventory:
        self.looks += 1
        return self.inventory

    def becomes(
        self, devices: list[tree.Device], usage: Usage | None = None, *, examined: bool = True
    ) -> None:
        # All machines lie at the same place, so that their devices are the same.
        self._times += 1
        place = self._tmp_path / "now"
        if place.exists():
            place.rename(self._tmp_path / f"before-{self._times}")
        listing = tree.write_tree(place, devices)
        if not examined:
            listing = tree.replace(listing, disks=tuple((path, None) for path, _ in listing.disks))
        self.inventory = inventory_of(listing, usage or Usage({}))

    def told(self, *changes: tuple[str, str, str]) -> list[str]:
        place = self._tmp_path / "now" / "devices"
        return names(
            self.tracker.handle([Change(action, kind, place / path) for action, kind, path in changes])
        )

    def looked(self) -> list[str]:
        return names(self.tracker.handle(None))


def names(events: list[Event]) -> list[str]:
    return [
        ("+" if isinstance(event, Appeared) else "-")
        + (event.device.node if isinstance(event.device, Namespace) else event.device.fpga.address)
        for event in events
    ]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


USER = next(device.path for device in tree.one_pair() if device.path.endswith(":04:00.1"))
NVME = f"{tree.ROOT_PORT}/0000:01:00.0/0000:02:00.0/0000:03:00.0"
DISK = f"{NVME}/nvme/nvme0/nvme0n1"
BOTH = ["+/dev/nvme0n1", "+0000:04:00.1"]
NEITHER = ["-0000:04:00.1", "-/dev/nvme0n1"]


def test_add_of_a_function_and_other_disks_cause_no_look(bench: Bench) -> None:
    bench.becomes(tree.one_pair())
    assert bench.told(("add", "pci", USER), ("change", "block", "virtual/block/loop0")) == []
    assert bench.looks == 0
    assert bench.told(("bind", "pci", USER)) == BOTH
    assert bench.looks == 1


def test_a_card_without_a_driver_is_no_news(bench: Bench) -> None:
    bench.becomes(tree.one_pair(bound=False))
    assert bench.looked() == ["+/dev/nvme0n1"]
    assert not bench.tracker.waiting


def test_ready_is_polled_until_it_is_so(bench: Bench) -> None:
    bench.becomes(tree.one_pair(ready=False))
    assert bench.looked() == ["+/dev/nvme0n1"]
    assert bench.tracker.waiting
    bench.now = 9.0
    assert bench.looked() == []
    bench.becomes(tree.one_pair())
    assert bench.looked() == ["+0000:04:00.1"]
    assert not bench.tracker.waiting


def test_the_deadline_is_that_of_the_first_look(bench: Bench) -> None:
    bench.becomes(tree.one_pair(ready=False))
    bench.looked()
    bench.now = 9.9
    assert bench.looked() == []
    bench.now = 10.0
    assert bench.looked() == ["+0000:04:00.1"]
    assert not bench.tracker.waiting
    bench.now = 30.0
    assert bench.looked() == []


def test_a_card_waits_for_its_drive(bench: Bench) -> None:
    bench.becomes([tree.root_port(), *tree.card(tree.ROOT_PORT, 1, None)])
    assert bench.looked() == []
    assert bench.tracker.waiting
    bench.becomes(tree.one_pair())
    assert bench.told(("add", "block", DISK)) == BOTH


def test_a_drive_waits_for_udev_to_examine_it(bench: Bench) -> None:
    bench.becomes(tree.one_pair(), examined=False)
    assert bench.told(("bind", "pci", USER)) == []
    assert bench.tracker.waiting
    bench.becomes(tree.one_pair())
    assert bench.told(("add", "block", DISK)) == BOTH
    # What is known stays, whatever udev says later.
    bench.becomes(tree.one_pair(), examined=False)
    assert bench.looked() == []


def test_without_udevd_a_drive_appears_after_the_deadline(bench: Bench) -> None:
    bench.becomes(tree.one_pair(), examined=False)
    assert bench.looked() == []
    bench.now = 10.0
    assert bench.looked() == BOTH
    assert not bench.inventory.namespaces[0].usable


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        (("remove", "block", DISK), NEITHER),
        (("unbind", "pci", NVME), NEITHER),
        (("remove", "pci", f"{tree.ROOT_PORT}/0000:01:00.0"), NEITHER),
        (("unbind", "pci", USER), NEITHER[:1]),
        (("remove", "pci", "pci0000:00/0000:00:07.0"), []),
    ],
)
def test_gone_and_back_between_two_looks_is_told_both_ways(
    bench: Bench, change: tuple[str, str, str], gone: list[str]
) -> None:
    bench.becomes(tree.one_pair())
    assert bench.looked() == BOTH
    back = [name.replace("-", "+") for name in reversed(gone)]
    assert bench.told(change) == gone + back


def test_a_lost_event_is_made_up_for_by_a_look(bench: Bench) -> None:
    bench.becomes(tree.one_pair())
    bench.looked()
    bench.becomes([tree.root_port()])
    assert bench.looked() == NEITHER
    bench.becomes(tree.one_pair())
    assert bench.looked() == BOTH


def other_number(devices: list[tree.Device]) -> list[tree.Device]:
    return [
        tree.replace(device, attributes={**device.attributes, "diskseq": "77\n"})
        if device.subsystem == "block"
        else device
        for device in devices
    ]


def test_the_kernels_number_tells_another_disk_at_the_same_place(bench: Bench) -> None:
    bench.becomes(tree.one_pair())
    bench.looked()
    bench.becomes(other_number(tree.one_pair()))
    assert bench.looked() == NEITHER + BOTH


@pytest.mark.parametrize("usage", [Usage({"259:0": "/mnt"}), Usage({"/dev/nvme0n1": "swap"})])
def test_what_is_done_to_a_known_drive_is_no_news(bench: Bench, usage: Usage) -> None:
    bench.becomes(tree.one_pair())
    bench.looked()
    bench.becomes(tree.one_pair(), usage)
    assert not bench.inventory.namespaces[0].usable
    assert bench.told(("change", "block", DISK)) == []
    assert bench.looks == 2
