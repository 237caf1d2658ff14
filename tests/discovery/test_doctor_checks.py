"""Verdicts of single checks, on machines that are files or made up."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import types
from dataclasses import replace
from pathlib import Path

import machine_tree as tree
import pytest
from typer.testing import CliRunner

from hillinferd.commands import devices as command
from hillinferd.discovery.inventory import inventory_of
from hillinferd.discovery.model import Inventory
from hillinferd.discovery.nvme import Usage
from hillinferd.doctor import access, card, host
from hillinferd.doctor.model import Check, Machine, Verdict

GIB = 1 << 30


def machine(pool: Path, devices: list[tree.Device] | None = None) -> Machine:
    inventory = inventory_of(tree.write_tree(pool / "sys", devices), Usage({})) if devices else Inventory()
    return Machine(inventory, "", pool, smallest_pool=1 << 17, arena=GIB)


def changed(devices: list[tree.Device], ending: str, **attributes: str) -> list[tree.Device]:
    return [
        replace(device, attributes={**device.attributes, **attributes})
        if device.path.endswith(ending)
        else device
        for device in devices
    ]


def test_a_bar_that_the_kernel_could_not_place_fails_with_the_bios_step(tmp_path: Path) -> None:
    line = "0x0000000000000000 0x00000001ffffffff 0x000000002014220c\n"
    found = card.above_4g(machine(tmp_path, changed(tree.one_pair(), ":04:00.1", resource=line)))
    assert found.verdict == Verdict.FAILED
    assert "8192 MiB" in found.detail
    assert "Above 4G decoding" in found.remedy


def test_p2p_on_without_its_bar_fails(tmp_path: Path) -> None:
    found = card.above_4g(machine(tmp_path, changed(tree.one_pair(), ":04:00.1", resource="")))
    assert found.verdict == Verdict.FAILED


def test_the_gravest_of_two_cards_counts_and_both_are_named(tmp_path: Path) -> None:
    devices, first, second = tree.outer_switch()
    devices += [*tree.card(first, 0x20, 0), *tree.card(second, 0x30, 1, p2p=False)]
    found = card.p2p(machine(tmp_path, devices))
    assert found.verdict == Verdict.WARNING
    assert "0000:23:00.1: P2P is on" in found.detail
    assert "0000:33:00.1: P2P is off" in found.detail
    assert "0000:33:00.1" in found.remedy
    assert "0000:23:00.1" not in found.remedy


def test_a_link_that_the_kernel_does_not_know_is_no_failure(tmp_path: Path) -> None:
    unknown = {"current_link_speed": "Unknown\n"}
    devices = changed(tree.one_pair(), "0000:01:00.0", **unknown)
    devices = changed(changed(devices, ":04:00.1", **unknown), ":04:00.0", **unknown)
    assert card.link(machine(tmp_path, devices)).verdict == Verdict.WARNING


@pytest.mark.parametrize(
    ("kind", "verdict"), [("identity", Verdict.OK), ("DMA-FQ", Verdict.WARNING), ("", Verdict.WARNING)]
)
def test_an_iommu_in_pass_through_is_no_matter(tmp_path: Path, kind: str, verdict: Verdict) -> None:
    group = tmp_path / "iommu_groups" / "7"
    group.mkdir(parents=True)
    if kind:
        (group / "type").write_text(f"{kind}\n")
    devices = [
        replace(device, links={**device.links, "iommu_group": str(group)})
        if device.path.endswith(":04:00.1")
        else device
        for device in tree.one_pair()
    ]
    found = card.iommu(machine(tmp_path, devices))
    assert found.verdict == verdict
    assert ("iommu=pt" in found.remedy) == (verdict == Verdict.WARNING)


def test_a_card_that_is_not_flashed_fails_once_and_the_rest_does_not_apply(tmp_path: Path) -> None:
    bare = machine(tmp_path, tree.one_pair(flashed=False))
    assert card.card(bare).verdict == Verdict.FAILED
    for check in (card.p2p, card.above_4g, card.iommu, card.link):
        assert check(bare).verdict == Verdict.NOT_APPLICABLE


def test_pyxrt_is_needed_with_a_card_only_and_a_hang_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyxrt.py").write_text("import time; time.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(host, "IMPORT_TIMEOUT_S", 0.5)
    found = host.xrt(machine(tmp_path, tree.one_pair()))
    assert found.verdict == Verdict.FAILED
    assert "took more than" in found.detail
    assert host.xrt(machine(tmp_path)).verdict == Verdict.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("mine", "service", "mode", "verdict"),
    [
        (True, None, 0o600, Verdict.OK),
        (True, "owner", 0o600, Verdict.OK),
        (True, "owner", 0o440, Verdict.WARNING),
        (True, "other", 0o660, Verdict.WARNING),
        (True, "group", 0o600, Verdict.WARNING),
        (True, "group", 0o660, Verdict.WARNING),
        (True, "group", 0o640, Verdict.WARNING),
        (False, "owner", 0o600, Verdict.WARNING),
        (False, "group", 0o660, Verdict.WARNING),
        (False, "other", 0o600, Verdict.FAILED),
        (False, None, 0o660, Verdict.FAILED),
    ],
)
def test_who_may_open_a_drive(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mine: bool,
    service: str | None,
    mode: int,
    verdict: Verdict,
) -> None:
    def account(name: str) -> types.SimpleNamespace:
        assert name == "hillinfer"
        if service is None:
            raise KeyError(name)
        return types.SimpleNamespace(
            pw_uid=4242 if service == "owner" else 4243, gr_gid=4244 if service == "group" else 4245
        )

    status = types.SimpleNamespace(st_uid=4242, st_gid=4244, st_mode=stat.S_IFBLK | mode)
    one = machine(tmp_path, tree.one_pair())
    monkeypatch.setattr(access.grp, "getgrnam", account)
    monkeypatch.setattr(access.pwd, "getpwnam", account)
    monkeypatch.setattr(access.os, "stat", lambda _: status)
    monkeypatch.setattr(access.os, "access", lambda *_: mine)
    for check in (access.namespaces, access.render_nodes):
        found = check(one)
        assert found.verdict == verdict
        assert bool(found.remedy) == (verdict != Verdict.OK)
        assert ("all who may attach" in found.detail) == (service == "group" and mode & 0o060 > 0)


def test_a_drive_in_use_needs_no_permissions(tmp_path: Path) -> None:
    one = machine(tmp_path, tree.drive("pci0000:00/0000:00:02.0", 0, signature="ext4"))
    assert access.namespaces(one).verdict == Verdict.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("limit", "exempt", "verdict"),
    [
        (8 << 20, False, Verdict.WARNING),
        (8 << 20, True, Verdict.OK),
        (GIB, False, Verdict.OK),
        (resource.RLIM_INFINITY, False, Verdict.OK),
    ],
)
def test_locked_memory_is_held_against_the_arena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, exempt: bool, verdict: Verdict
) -> None:
    monkeypatch.setattr(host.resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(host, "_may_lock", lambda: exempt)
    assert host.memory_lock(machine(tmp_path)).verdict == verdict


@pytest.mark.parametrize(
    ("number", "verdict"), [(errno.EINVAL, Verdict.WARNING), (errno.EROFS, Verdict.FAILED)]
)
def test_a_file_system_without_direct_io_is_told_from_one_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, verdict: Verdict
) -> None:
    def refuse(_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(host, "_read_direct", refuse)
    assert host.direct_io(machine(tmp_path)).verdict == verdict
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", [False, True])
def test_a_pool_that_is_the_daemons_alone_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: bool
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def its_answer(_: Path | None) -> tuple[Check, Path]:
        return Check("daemon", Verdict.OK, "it answers", ""), tmp_path

    def verdicts(*arguments: str) -> set[str]:
        done = CliRunner().invoke(command.app, ["doctor", "--json", *arguments])
        checks = json.loads(done.stdout)["checks"]
        refused = {"direct I/O", "free space"} if device else {"direct I/O"}
        return {check["verdict"] for check in checks if check["name"] in refused}

    monkeypatch.setattr(command, "look_at_daemon", its_answer)
    monkeypatch.setattr(host, "_read_direct", refuse)
    if device:
        monkeypatch.setattr(host, "_is_block", lambda _: True)
        before = Path.open

        def opened(path: Path, *how: object, **more: object) -> object:
            return refuse() if path == tmp_path else before(path, *how, **more)

        monkeypatch.setattr(Path, "open", opened)
    assert verdicts() == {"not applicable"}
    assert verdicts("--pool", str(tmp_path)) == {"failed"}


def test_the_pool_may_be_a_file_that_is_there(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.write_bytes(bytes(1 << 20))
    before = pool.read_bytes()
    here = replace(machine(tmp_path), pool=pool)
    assert host.direct_io(here).verdict in {Verdict.OK, Verdict.WARNING}
    assert host.free_space(here).verdict == Verdict.OK
    assert pool.read_bytes() == before


def test_only_portable_code_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.kernel, "variants", lambda: ["portable"])
    assert host.processor(machine(tmp_path)).verdict == Verdict.WARNING
    monkeypatch.setattr(host.kernel, "variants", lambda: ["portable", "avx2"])
    assert "avx2" in host.processor(machine(tmp_path)).detail
