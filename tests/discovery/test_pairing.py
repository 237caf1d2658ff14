"""Discovery on a tree of files that looks like sysfs: no udev, no umockdev, no hardware."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import machine_tree as tree
import pytest

from hillinferd.discovery.inventory import inventory_of
from hillinferd.discovery.model import Inventory, Link
from hillinferd.discovery.nvme import Usage

IDLE = Usage({})


def found(tmp_path: Path, devices: list[tree.Device], usage: Usage = IDLE) -> Inventory:
    return inventory_of(tree.write_tree(tmp_path, devices), usage)


def pairs(inventory: Inventory) -> dict[str, str | None]:
    return {card.fpga.address: card.namespace.node if card.namespace else None for card in inventory.cards}


def test_one_pair_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    inventory = found(tmp_path, tree.one_pair())
    (card,) = inventory.cards
    assert card.usable
    assert card.problems == ()
    assert card.namespace == inventory.namespaces[0]
    assert card.namespace.node == "/dev/nvme0n1"
    assert card.namespace.model == "SAMSUNG MZ1LB3T8HMLA"
    assert card.namespace.size == 7501476528 * 512
    assert card.namespace.block_size == 512
    assert card.namespace.pci_address == "0000:03:00.0"
    assert (card.fpga.management, card.fpga.user) == ("0000:04:00.0", "0000:04:00.1")
    assert card.fpga.render_node == "/dev/dri/renderD129"
    assert card.fpga.interface_uuids == (tree.INTERFACE_UUID,)
    assert card.fpga.xclbin_uuid == ""
    assert card.fpga.shell == tree.SHELL
    assert card.fpga.p2p is True
    assert card.fpga.bars == (32 << 20, 8 << 30, 64 << 10)
    assert card.uplink == Link(8.0, 4, 8.0, 4)


@pytest.mark.parametrize("swapped", [False, True])
def test_each_of_two_cards_gets_its_own_drive(tmp_path: Path, swapped: bool) -> None:
    devices, first, second = tree.outer_switch()
    one, two = (1, 0) if swapped else (0, 1)
    devices += [*tree.card(first, 0x20, one), *tree.card(second, 0x30, two)]
    assert pairs(found(tmp_path, devices)) == {
        "0000:23:00.1": f"/dev/nvme{one}n1",
        "0000:33:00.1": f"/dev/nvme{two}n1",
    }


def test_a_drive_that_only_shares_the_root_port_is_not_the_cards(tmp_path: Path) -> None:
    devices, first, second = tree.outer_switch()
    devices += [*tree.card(first, 0x20, None), *tree.drive(f"{second}/0000:30:00.0", 0)]
    inventory = found(tmp_path, devices)
    assert pairs(inventory) == {"0000:23:00.1": None}
    (card,) = inventory.cards
    assert not card.usable
    assert [problem.text for problem in card.problems] == ["no NVMe drive lies below its switch"]
    assert [space.usable for space in inventory.namespaces] == [True]


def test_a_drive_of_another_make_below_the_switch_is_not_the_cards(tmp_path: Path) -> None:
    devices = [tree.root_port(), *tree.card(tree.ROOT_PORT, 1, None)]
    devices += tree.drive(f"{tree.ROOT_PORT}/0000:01:00.0/0000:02:00.0/0000:03:00.0", 0, "8086:0a54")
    assert pairs(found(tmp_path, devices)) == {"0000:04:00.1": None}


def test_two_drives_below_one_switch_are_not_guessed_at(tmp_path: Path) -> None:
    devices = tree.one_pair()
    devices += tree.drive(f"{tree.ROOT_PORT}/0000:01:00.0/0000:02:00.0/0000:05:00.0", 1)
    inventory = found(tmp_path, devices)
    assert pairs(inventory) == {"0000:04:00.1": None}
    assert "several drives" in inventory.cards[0].problems[0].text


def test_a_card_in_a_virtual_machine_without_its_management_function(tmp_path: Path) -> None:
    devices = [device for device in tree.one_pair() if not device.path.endswith("0000:04:00.0")]
    (card,) = found(tmp_path, devices).cards
    assert card.usable
    assert card.fpga.management == ""


def test_class_codes_are_not_looked_at(tmp_path: Path) -> None:
    devices = [
        replace(device, attributes={**device.attributes, "class": "0x058000\n"})
        if device.subsystem == "pci"
        else device
        for device in tree.one_pair()
    ]
    assert pairs(found(tmp_path, devices)) == {"0000:04:00.1": "/dev/nvme0n1"}


@pytest.mark.parametrize(
    ("options", "says", "usable"),
    [
        ({"flashed": False}, "not flashed", False),
        ({"bound": False}, "no driver is bound to 0000:04:00.1", False),
        ({"ready": False}, "does not say that it is ready", False),
        ({"p2p": False}, "P2P is off", True),
    ],
)
def test_what_is_wrong_with_a_card_is_said_with_a_remedy(
    tmp_path: Path, options: dict[str, bool], says: str, usable: bool
) -> None:
    (card,) = found(tmp_path, tree.one_pair(**options)).cards
    (problem,) = card.problems
    assert says in problem.text
    assert problem.remedy
    assert card.usable is usable


def test_a_card_bound_to_another_driver_names_it(tmp_path: Path) -> None:
    devices = [
        device.bound("vfio-pci") if device.path.endswith(":04:00.1") else device
        for device in tree.one_pair(bound=False)
    ]
    (card,) = found(tmp_path, devices).cards
    assert "0000:04:00.1 is bound to vfio-pci" in card.problems[0].text
    assert not card.usable


def test_a_machine_with_nvme_only(tmp_path: Path) -> None:
    inventory = found(tmp_path, [tree.root_port(), *tree.drive(f"{tree.ROOT_PORT}/0000:01:00.0", 0)])
    assert inventory.cards == ()
    assert [space.node for space in inventory.namespaces] == ["/dev/nvme0n1"]
    assert inventory.namespaces[0].usable


def test_a_namespace_below_a_multipath_subsystem_finds_its_card(tmp_path: Path) -> None:
    devices = tree.one_pair()
    disk = devices.pop(next(i for i, device in enumerate(devices) if device.subsystem == "block"))
    controller = next(device.path for device in devices if device.subsystem == "nvme")
    system = "virtual/nvme-subsystem/nvme-subsys0"
    devices += [
        tree.Device(system, "nvme-subsystem", {"serial": "S1\n"}, links={"nvme0": f"../../../{controller}"}),
        replace(disk, path=f"{system}/nvme0n1", links={"device": "../../nvme-subsys0"}),
        # One path to it, which is no disk of its own.
        replace(disk, path=f"{controller}/nvme0c0n1", attributes={"hidden": "1\n"}, node=""),
    ]
    inventory = found(tmp_path, devices)
    assert [space.node for space in inventory.namespaces] == ["/dev/nvme0n1"]
    assert inventory.namespaces[0].serial == "S1"
    assert pairs(inventory) == {"0000:04:00.1": "/dev/nvme0n1"}


def with_disk(devices: list[tree.Device], **attributes: str) -> list[tree.Device]:
    return [
        replace(device, attributes={**device.attributes, **attributes})
        if device.subsystem == "block"
        else device
        for device in devices
    ]


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"size": "0\n"}, "no capacity"),
        ({"ro": "1\n"}, "read-only"),
        ({"holders/md127": ""}, "held by md127"),
        ({"nvme0n1p1/partition": "1\n", "nvme0n1p1/dev": "259:7\n"}, "has partitions"),
    ],
)
def test_a_namespace_that_is_in_use_is_not_usable(
    tmp_path: Path, attributes: dict[str, str], says: str
) -> None:
    inventory = found(tmp_path, with_disk(tree.one_pair(), **attributes))
    (problem,) = inventory.namespaces[0].problems
    assert says in problem.text
    assert problem.remedy
    assert not inventory.namespaces[0].usable
    assert not inventory.cards[0].usable
    assert problem in inventory.cards[0].problems


def test_a_namespace_with_a_file_system_or_one_nobody_looked_at_is_not_usable(tmp_path: Path) -> None:
    devices = [*tree.drive("pci0000:00/0000:00:02.0", 0, signature="ext4")]
    devices += tree.drive("pci0000:00/0000:00:03.0", 1)
    listing = tree.write_tree(tmp_path, devices)
    unseen = replace(listing, disks=(listing.disks[0], (listing.disks[1][0], None)))
    first, second = inventory_of(unseen, IDLE).namespaces
    assert "content: ext4" in first.problems[0].text
    assert "udev has not examined it" in second.problems[0].text
    assert not first.usable
    assert not second.usable


MOUNTS = """\
22 1 259:7 / /mnt/two\\040words rw,relatime shared:1 - ext4 /dev/nvme0n1p1 rw
23 1 0:31 / /home rw,relatime - btrfs /dev/nvme1n1 rw,subvol=/
24 1 0:5 / /dev rw - devtmpfs udev rw
"""
SWAPS = """\
Filename				Type		Size		Used		Priority
/dev/nvme2n1                            partition	8388604		0		-2
"""


def test_mounts_and_swap_are_found_by_number_and_by_node(tmp_path: Path) -> None:
    devices = [device for n in range(4) for device in tree.drive(f"pci0000:00/0000:00:0{n}.0", n)]
    listing = tree.write_tree(tmp_path, devices)
    partition = listing.disks[0][0] / "nvme0n1p1"
    partition.mkdir()
    (partition / "partition").write_text("1\n")
    (partition / "dev").write_text("259:7\n")
    (listing.disks[0][0] / "nvme0n1p2").mkdir()
    (listing.disks[0][0] / "nvme0n1p2" / "partition").write_text("2\n")
    spaces = inventory_of(listing, Usage.of(MOUNTS, SWAPS)).namespaces
    assert "/dev/nvme0n1p1 is mounted at /mnt/two words" in spaces[0].problems[0].text
    assert spaces[0].problems[1].remedy.endswith("as the pool: /dev/nvme0n1p2")
    assert "/dev/nvme1n1 is mounted at /home" in spaces[1].problems[0].text
    assert "/dev/nvme2n1 is swap" in spaces[2].problems[0].text
    assert spaces[3].usable


def test_bars_without_an_address_are_told_from_those_with_one(tmp_path: Path) -> None:
    devices = [
        replace(
            device,
            attributes={
                **device.attributes,
                "resource": "0x00000000d0000000 0x00000000d1ffffff 0x0000000000040200\n"
                "0x0000000000000000 0x00000001ffffffff 0x000000002014220c\n",
            },
        )
        if device.path.endswith(":04:00.1")
        else device
        for device in tree.one_pair()
    ]
    (card,) = found(tmp_path, devices).cards
    assert card.fpga.bars == (32 << 20,)
    assert card.fpga.unassigned_bars == (8 << 30,)


def test_a_device_that_goes_while_it_is_looked_at_does_no_harm(tmp_path: Path) -> None:
    listing = tree.write_tree(tmp_path, tree.one_pair())
    gone = replace(
        listing,
        functions=(*listing.functions, tmp_path / "devices" / "0000:99:00.0"),
        disks=(*listing.disks, (tmp_path / "devices" / "nvme7n1", {})),
    )
    inventory = inventory_of(gone, IDLE)
    assert pairs(inventory) == {"0000:04:00.1": "/dev/nvme0n1"}
    assert [space.usable for space in inventory.namespaces] == [True, False]
