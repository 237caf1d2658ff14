"""What could be lost between a commit and its acknowledgement, or by a repair."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from raw_client import RawClient, Refused, log_of, random_rows, running_daemon, spawn

from hillinfer_core.errors import DamagedCatalogue, PoolFull, VersionMismatch
from hillinfer_core.layout import DType, Precision, Shape
from hillinfer_core.protocol import LAYOUT_VERSION
from hillinferd.domain.durable import Durable
from hillinferd.records.database import Database, Key
from hillinferd.records.durable import DurableRecords

SHAPE = Shape(2, 2, 64, DType.float16, Precision.int4)
ROWS = random_rows(np.random.default_rng(1), SHAPE, 64)


def flags(directory: Path) -> tuple[str, ...]:
    return ("--pool", str(directory / "pool"), "--pool-capacity", "8MiB")


def fsck(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "hillinferd.ctl", "fsck", str(directory / "pool"), *options]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def durable(name: str) -> Durable:
    return Durable(0, name, 0, SHAPE, {}, 0)


def write(client: RawClient, name: str, tokens: int = 48) -> int:
    context = client.open_named(SHAPE, durable_name=name).context_id
    for layer in range(SHAPE.layers):
        client.append(context, layer, 0, ROWS[:, :tokens])
    return context


def two_saved(directory: Path) -> None:
    runtime = directory / "r1"
    with running_daemon(runtime, *flags(directory)), RawClient(runtime) as client:
        for name in ("one", "two"):
            client.save(write(client, name))


def refusal(runtime_dir: Path, *options: str) -> str:
    """The last line of a daemon that does not start."""
    runtime_dir.mkdir()
    process = spawn(runtime_dir, *options)
    try:
        assert process.wait(60) == 1
    finally:
        process.kill()
    return log_of(runtime_dir).strip().splitlines()[-1]


def test_a_context_that_could_not_be_recorded_takes_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = DurableRecords(Database(tmp_path / "catalogue"))
    failed, other = durable("failed"), durable("other")
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise PoolFull("no room")

        patch.setattr(records.database, "put", full)
        with pytest.raises(PoolFull):
            records.create(failed)
    assert failed.record_id == 0
    records.create(other)
    assert [found.name for found in records.load()] == ["other"]
    records.database.close()


def test_a_counter_that_cannot_be_written_does_not_undo_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(tmp_path / "catalogue")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        database.bind("pool")
    database.close()
    again = Database(tmp_path / "catalogue")
    assert again.pool_id == "pool"
    again.close()


@pytest.mark.parametrize("cut_short", ["", "empty", "no counter"])
def test_a_catalogue_whose_making_was_cut_short_is_made_anew(tmp_path: Path, cut_short: str) -> None:
    path = tmp_path / "catalogue"
    if cut_short:
        path.write_bytes(b"")
    if cut_short == "empty":
        (tmp_path / "catalogue.sequence").write_bytes(b"")
    database = Database(path)
    assert database.fresh
    database.bind("pool")
    database.close()
    again = Database(path)
    assert (again.fresh, again.pool_id) == (False, "pool")
    again.close()


def test_salvage_deletes_only_contexts_with_damaged_records(tmp_path: Path) -> None:
    path = tmp_path / "catalogue"
    records = DurableRecords(Database(path))
    for name in ("one", "two", "three"):
        records.create(durable(name))
    key = Key("layer", 2, 1)
    records.database._db.execute(
        "UPDATE record SET crc = crc + 1 WHERE kind = ? AND context = ? AND layer = ?",
        (key.kind, key.context, key.layer),
    )
    records.database.close()
    with pytest.raises(DamagedCatalogue, match="fails its checksum"):
        Database(path)
    salvaged = Database(path, salvage=True)
    assert salvaged.salvaged == {2}
    assert [found.name for found in DurableRecords(salvaged).load()] == ["one", "three"]
    salvaged.close()
    Database(path).close()


def test_a_newer_format_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("hillinferd.records.database.FORMAT", 99)
        Database(tmp_path / "catalogue").close()
    for salvage in (False, True):
        with pytest.raises(VersionMismatch, match="format 99"):
            Database(tmp_path / "catalogue", salvage=salvage)


def test_a_context_of_another_layout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(tmp_path / "catalogue")
    records = DurableRecords(database)
    with monkeypatch.context() as patch:
        patch.setattr("hillinferd.records.durable.LAYOUT_VERSION", 1)
        records.create(durable("book"))
    with pytest.raises(VersionMismatch, match=f"'book' has layout 1, this daemon {LAYOUT_VERSION}; use"):
        records.load()
    database.close()


def test_a_tail_does_not_outlive_the_append_that_follows_it(runtime_dir: Path) -> None:
    with running_daemon(runtime_dir, *flags(runtime_dir)), RawClient(runtime_dir) as client:
        context = write(client, "book", 16)
        for layer in range(SHAPE.layers):
            client.append(context, layer, 16, ROWS[:, 16:21], tail=True)
            client.append(context, layer, 16, ROWS[:, 16:32])
        client.save(context)
        client.close_context(context)
        opened = client.open_named(SHAPE, base_name="book")
        assert list(opened.layer_tokens) == [32, 32]
        assert list(opened.tail_tokens) == [0, 0]


def test_a_pool_is_not_emptied_for_a_catalogue_that_is_not_its_own(runtime_dir: Path) -> None:
    two_saved(runtime_dir)
    before = (runtime_dir / "pool").read_bytes()
    elsewhere = runtime_dir / "elsewhere"
    elsewhere.mkdir()
    for attempt in range(2):
        said = refusal(runtime_dir / f"r2{attempt}", *flags(runtime_dir), "--state-dir", str(elsewhere))
        assert "has no catalogue" in said
        assert list(elsewhere.iterdir()) == []
    # One of another pool, without any context in it.
    other = runtime_dir / "other"
    other.mkdir()
    with running_daemon(other / "r", *flags(other)):
        pass
    for file in other.glob("pool.catalogue*"):
        shutil.copy(file, elsewhere)
    said = refusal(runtime_dir / "r3", *flags(runtime_dir), "--state-dir", str(elsewhere))
    assert "another catalogue" in said
    assert (runtime_dir / "pool").read_bytes() == before
    assert fsck(runtime_dir).returncode == 0
    wrong = fsck(runtime_dir, "--repair", "--state-dir", str(elsewhere))
    assert wrong.returncode == 1
    assert "belongs to another pool" in wrong.stderr


def test_a_new_pool_is_not_taken_for_the_one_that_is_missing(runtime_dir: Path) -> None:
    two_saved(runtime_dir)
    kept = (runtime_dir / "pool").rename(runtime_dir / "kept")
    for attempt in range(2):
        said = refusal(runtime_dir / f"r2{attempt}", *flags(runtime_dir))
        assert "belongs to another pool" in said
    kept.rename(runtime_dir / "pool")
    assert fsck(runtime_dir).returncode == 0


def test_repair_deletes_what_is_damaged_and_nothing_else(runtime_dir: Path) -> None:
    two_saved(runtime_dir)
    pool = runtime_dir / "pool"
    data = bytearray(pool.read_bytes())
    data[data.index(ROWS[1, 5].tobytes())] ^= 1
    pool.write_bytes(data)
    found = fsck(runtime_dir, "--json")
    assert found.returncode == 1
    damaged = {item["name"]: item["damaged_rows"] for item in json.loads(found.stdout)["contexts"]}
    assert sorted(damaged.values()) == [0, 1]
    repaired = json.loads(fsck(runtime_dir, "--repair", "--json").stdout)
    assert repaired["outcome"] == "1 contexts deleted"
    again = runtime_dir / "r2"
    with running_daemon(again, *flags(runtime_dir)), RawClient(again) as client:
        (left,) = client.durable()
        assert damaged[left] == 0
        context = client.open_named(SHAPE, base_name=left).context_id
        np.testing.assert_array_equal(client.fetch_range(context, SHAPE, 1, 0, 48), ROWS[:, :48])


def test_a_catalogue_that_cannot_be_read_is_set_aside_and_said(runtime_dir: Path) -> None:
    two_saved(runtime_dir)
    catalogue = runtime_dir / "pool.catalogue"
    data = bytearray(catalogue.read_bytes())
    data[:64] = bytes(64)
    catalogue.write_bytes(data)
    assert fsck(runtime_dir).returncode == 1
    repaired = fsck(runtime_dir, "--repair")
    assert "all contexts given up" in repaired.stdout
    assert (runtime_dir / "pool.catalogue.old1").read_bytes() == data
    again = runtime_dir / "r2"
    with running_daemon(again, *flags(runtime_dir)), RawClient(again) as client:
        assert client.durable() == {}


def test_repair_of_a_lost_counter_loses_no_context(runtime_dir: Path) -> None:
    two_saved(runtime_dir)
    counter = runtime_dir / "pool.catalogue.sequence"
    counter.unlink()
    assert counter.name in fsck(runtime_dir).stderr
    assert not counter.exists()
    assert json.loads(fsck(runtime_dir, "--repair", "--json").stdout)["outcome"] == "clean"
    found = json.loads(fsck(runtime_dir, "--json").stdout)
    assert [item["name"] for item in found["contexts"]] == ["one", "two"]


@pytest.mark.parametrize("damage", ["counter lost", "catalogue lost", "catalogue damaged", "only set aside"])
def test_what_root_repairs_stays_the_daemons(runtime_dir: Path, damage: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving files away needs root")
    two_saved(runtime_dir)
    catalogue, counter = runtime_dir / "pool.catalogue", runtime_dir / "pool.catalogue.sequence"
    if damage == "counter lost":
        counter.unlink()
    elif damage == "catalogue lost":
        catalogue.unlink()
    elif damage == "catalogue damaged":
        catalogue.write_bytes(b"damaged")
    else:
        for path in (catalogue, counter):
            path.rename(str(path).replace("catalogue", "catalogue.old1"))
    for path in runtime_dir.glob("pool*"):
        os.chown(path, 65534, 65533)
    repaired = fsck(runtime_dir, "--repair")
    assert repaired.returncode == 0, repaired.stderr
    assert ("all contexts given up" in repaired.stdout) == (damage != "counter lost")
    for path in (catalogue, counter):
        assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65533), path
        assert path.stat().st_mode & 0o777 == 0o600


def test_without_a_catalogue_nothing_is_repaired_and_none_is_made(runtime_dir: Path) -> None:
    two_saved(runtime_dir)
    for path in runtime_dir.glob("pool.catalogue*"):
        path.rename(runtime_dir / f"kept-{path.name}")
    for options in ((), ("--repair",)):
        refused = fsck(runtime_dir, *options)
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"hillinferctl: there is no {runtime_dir}/pool.catalogue, ")
        assert refused.stderr.count("\n") == 1
    assert not list(runtime_dir.glob("pool.catalogue*"))


def test_names_are_printed_as_they_are(runtime_dir: Path) -> None:
    with running_daemon(runtime_dir / "r", *flags(runtime_dir)), RawClient(runtime_dir / "r") as client:
        client.save(write(client, "[/x] [red]"))
    found = fsck(runtime_dir)
    assert (found.returncode, found.stderr) == (0, "")
    assert "[/x] [red]" in found.stdout


def test_requests_that_would_hold_the_drive_for_minutes_are_refused(daemon: Path) -> None:
    with RawClient(daemon) as client:
        context = client.open(SHAPE)
        client.append(context, 0, 0, ROWS)
        query = np.ones((2 * 129, 64), np.float32)
        with pytest.raises(Refused, match="129 query heads"):
            client.evaluate(context, SHAPE, 0, query, 1, 0, 64)
        many = Shape(4096, 1, 8, DType.float16, Precision.int4)
        for _ in range(15):
            client.open(many)
        with pytest.raises(Refused, match="close some"):
            client.open(many)
