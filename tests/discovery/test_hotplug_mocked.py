"""Devices that come and go under umockdev: real libudev, real pyudev, real netlink messages."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine_tree as tree
import pytest

pytestmark = pytest.mark.skipif(not shutil.which("umockdev-wrapper"), reason="umockdev is not installed")

CARD = "0000:04:00.1"
SWITCH = f"/devices/{tree.ROOT_PORT}/0000:01:00.0"
USER = f"{SWITCH}/0000:02:01.0/{CARD}"
NVME = f"{SWITCH}/0000:02:00.0/0000:03:00.0"
DISK = f"{NVME}/nvme/nvme0/nvme0n1"
OTHER_DISK = "/devices/pci0000:00/0000:00:02.0/nvme/nvme9/nvme9n1"


class Watched:
    """A process that watches a mocked machine."""

    def __init__(self, devices: list[tree.Device], ready_within_s: float) -> None:
        self._process = subprocess.Popen(
            [
                "umockdev-wrapper",
                sys.executable,
                str(Path(__file__).with_name("testbed_process.py")),
                str(ready_within_s),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.tell(add=tree.describe(devices))

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)

    def tell(self, **command: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def expect(self, *events: tuple[str, str, bool]) -> None:
        """The next events are these, in any order."""
        assert sorted(tuple(json.loads(self._lines.get(timeout=30))) for _ in events) == sorted(events)

    def nothing_else(self) -> None:
        """All that was told so far has made no other event: the next are those that are caused here."""
        self.tell(uevent=[OTHER_DISK, "remove"])
        self.expect(("disappeared", "/dev/nvme9n1", True), ("appeared", "/dev/nvme9n1", True))

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            # It deletes the mocked machine first.
            assert self._process.wait(timeout=30) == 0
        finally:
            self._process.kill()


@pytest.fixture
def start() -> Iterator[Any]:
    running: list[Watched] = []

    def begin(devices: list[tree.Device], ready_within_s: float = 60.0) -> Watched:
        watched = Watched([*devices, *tree.drive("pci0000:00/0000:00:02.0", 9)], ready_within_s)
        running.append(watched)
        return watched

    yield begin
    for watched in running:
        watched.close()


OTHER = ("appeared", "/dev/nvme9n1", True)
HERE = [("appeared", "/dev/nvme0n1", True), ("appeared", CARD, True)]
GONE = [("disappeared", "/dev/nvme0n1", True), ("disappeared", CARD, True)]


def test_what_is_there_at_the_start_appears(start: Any) -> None:
    watched = start(tree.one_pair())
    watched.expect(*HERE, OTHER)
    watched.nothing_else()


def test_a_card_counts_from_bind_and_ready_not_from_add(start: Any) -> None:
    watched = start([tree.root_port()])
    watched.expect(OTHER)
    # The functions come first, without drivers; their `add` says nothing yet.
    watched.tell(add=tree.describe(tree.card(tree.ROOT_PORT, 1, None, bound=False)))
    watched.tell(uevent=[USER, "add"])
    watched.nothing_else()
    # The card's drive comes.
    watched.tell(add=tree.describe(tree.drive(NVME.removeprefix("/devices/"), 0)))
    watched.tell(uevent=[DISK, "add"])
    watched.expect(HERE[0])
    # The driver has bound, but is not ready before the attribute says so, which no event announces.
    watched.tell(link=[USER, "driver", "../../../../../../bus/pci/drivers/xocl"])
    watched.tell(set=[USER, "ready", "0x0\n"])
    watched.tell(add=tree.describe([tree.user_function(USER.removeprefix("/devices/"), 1)[-1]]))
    watched.tell(uevent=[USER, "bind"])
    watched.nothing_else()
    watched.tell(set=[USER, "ready", "0x1\n"])
    watched.expect(HERE[1])


def test_a_card_that_is_never_ready_appears_after_the_deadline_as_unusable(start: Any) -> None:
    watched = start(tree.one_pair(ready=False), ready_within_s=0.0)
    watched.expect(HERE[0], ("appeared", CARD, False), OTHER)
    watched.nothing_else()


def test_a_removed_drive_takes_its_card_along_and_both_come_back(start: Any) -> None:
    watched = start(tree.one_pair())
    watched.expect(*HERE, OTHER)
    watched.tell(remove=DISK)
    watched.expect(*GONE)
    watched.tell(remove=f"{NVME}/nvme/nvme0")
    watched.tell(remove=NVME)
    # Without its drive the card waits, as for one that is still to come.
    watched.nothing_else()
    watched.tell(add=tree.describe(tree.drive(NVME.removeprefix("/devices/"), 0)))
    watched.tell(uevent=[DISK, "add"])
    watched.expect(*HERE)


def test_unbind_of_the_driver_takes_the_card_and_leaves_the_drive(start: Any) -> None:
    watched = start(tree.one_pair())
    watched.expect(*HERE, OTHER)
    watched.tell(unlink=[USER, "driver"])
    watched.tell(uevent=[USER, "unbind"])
    watched.expect(GONE[1])
    watched.nothing_else()
    watched.tell(link=[USER, "driver", "../../../../../../bus/pci/drivers/xocl"])
    watched.tell(uevent=[USER, "bind"])
    watched.expect(HERE[1])


def test_a_drive_that_was_gone_for_a_moment_only_is_reported_as_gone_and_back(start: Any) -> None:
    watched = start(tree.one_pair())
    watched.expect(*HERE, OTHER)
    # By the time that anyone looks it is there again.
    watched.tell(uevent=[DISK, "remove"])
    watched.expect(*GONE, *HERE)


def test_one_of_two_cards_goes_and_the_other_stays(start: Any) -> None:
    devices, first, second = tree.outer_switch()
    watched = start([*devices, *tree.card(first, 0x20, 0), *tree.card(second, 0x30, 1)])
    watched.expect(
        *(("appeared", f"/dev/nvme{number}n1", True) for number in (0, 1, 9)),
        ("appeared", "0000:23:00.1", True),
        ("appeared", "0000:33:00.1", True),
    )
    watched.tell(remove=f"/devices/{first}/0000:20:00.0")
    watched.expect(("disappeared", "/dev/nvme0n1", True), ("disappeared", "0000:23:00.1", True))
    watched.nothing_else()
