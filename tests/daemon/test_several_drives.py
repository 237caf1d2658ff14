"""One daemon with two drives: what lies where, and one of them failing while the other serves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from raw_client import RawClient, Refused, log_of, random_rows, running_daemon, wait_for

from hillinfer_core.errors import ConfigError
from hillinfer_core.layout import DType, Precision, Reduction, Shape
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinferd import config
from hillinferd.driver.block import format_device
from hillinferd.driver.storage import Storage
from hillinferd.records import catalogue_path

SHAPE = Shape(1, 2, 64, DType.float16, Precision.int4)
ROWS = random_rows(np.random.default_rng(5), SHAPE, 1024)
PATIENCE_S = 2


def configured(runtime_dir: Path, *pools: Path) -> tuple[str, str]:
    """Flags of a daemon with a drive for each pool, that waits for a request for two seconds."""
    tables = [
        f'[[drive]]\nname = "{pool.name}"\npool = "{pool}"\npool_capacity = "64MiB"\n' for pool in pools
    ]
    file = runtime_dir / "hillinfer.toml"
    file.write_text(f'request_timeout = {PATIENCE_S}\nstate_dir = "{runtime_dir}"\n' + "".join(tables))
    return "--config", str(file)


@pytest.fixture
def flags(runtime_dir: Path) -> tuple[str, str]:
    return configured(runtime_dir, runtime_dir / "one", runtime_dir / "two")


@pytest.fixture
def two(runtime_dir: Path, flags: tuple[str, str]) -> Iterator[Path]:
    with running_daemon(runtime_dir, *flags):
        yield runtime_dir


def fill(client: RawClient, name: str = "") -> int:
    context: int = client.open_named(SHAPE, durable_name=name).context_id if name else client.open(SHAPE)
    client.append(context, 0, 0, ROWS)
    return context


def check(client: RawClient, context: int) -> None:
    np.testing.assert_array_equal(client.fetch_range(context, SHAPE, 0, 100, 900), ROWS[:, 100:1000])


def drives(client: RawClient) -> dict[str, pb.DriveStatus]:
    return {drive.name: drive for drive in client.status().drives}


def states(client: RawClient) -> list[str]:
    return [drive.state for drive in client.status().drives]


def test_contexts_go_to_the_emptier_drive_and_are_found_there(two: Path) -> None:
    with RawClient(two) as a, RawClient(two) as b:
        fill(a, "first")
        fill(b, "second")
        assert {name: item.drive for name, item in a.durable().items()} == {"first": "one", "second": "two"}
        # What a session opens next lies beside what it has, so that one request can rank both.
        mine = [fill(b), fill(b)]
        used = drives(a)
        assert used["two"].pool.used_bytes == 3 * used["one"].pool.used_bytes > 0
        answer = b.call("Evaluate", evaluation(b, mine))
        assert len(answer.results) == 2
        # A name leads to its drive, wherever the session's other contexts lie.
        for name in ("first", "second"):
            wanted = a if name == "first" else b
            context = int(wanted.open_named(SHAPE, durable_name="other " + name).context_id)
            wanted.close_context(context)
        a.connection.close()
        wait_for(lambda: b.durable()["first"].users == 0, 60)
        there = int(b.open_named(SHAPE, durable_name="first").context_id)
        check(b, there)
        with pytest.raises(Refused, match="must lie on one drive") as caught:
            b.call("Evaluate", evaluation(b, [mine[0], there]))
        assert caught.value.error == "InvalidInput"
        with pytest.raises(Refused, match="there is no context 'third'"):
            b.open_named(SHAPE, base_name="third")


def evaluation(client: RawClient, contexts: list[int]) -> pb.EvaluateRequest:
    client.reset()
    items = []
    for context in contexts:
        query, view = client.take((2, 64), np.float32)
        view[...] = 1
        ids, _ = client.take((2, 10), np.uint32)
        scores, _ = client.take((2, 10), np.int32)
        items.append(
            pb.Evaluation(context_id=context, end_token=1024, k=10, query=query, ids=ids, scores=scores)
        )
    return pb.EvaluateRequest(layer=0, query_heads=2, reduction=Reduction.sum.to_proto(), evaluations=items)


def test_a_drive_that_hangs_is_given_up_at_its_deadline_and_the_other_serves(
    runtime_dir: Path, flags: tuple[str, str]
) -> None:
    with running_daemon(runtime_dir, *flags) as daemon:
        with RawClient(runtime_dir) as a, RawClient(runtime_dir) as b:
            durable, volatile, elsewhere = fill(a, "book"), fill(a), fill(b)
            hung = drives(a)["one"].device.worker_pid
            errors: list[Refused] = []

            def work() -> None:
                try:
                    check(a, durable)
                except Refused as error:
                    errors.append(error)

            os.kill(hung, signal.SIGSTOP)
            thread = threading.Thread(target=work)
            thread.start()
            answered = 0
            while thread.is_alive():
                check(b, elsewhere)
                with RawClient(runtime_dir) as late:
                    assert late.status().drives[1].state == "serving"
                answered += 1
            thread.join()
            assert answered > 1
            assert [(error.error, error.code.name if error.code else "") for error in errors] == [
                ("DeviceUnavailable", "UNAVAILABLE")
            ]
            assert f"drive one did not answer in {PATIENCE_S} s" in errors[0].message
            wait_for(lambda: states(a) == ["serving", "serving"], 60)
            now = drives(a)
            assert now["one"].device.worker_pid != hung
            assert now["one"].device.worker_restarts == 1
            assert now["two"].device.worker_restarts == 0
            check(a, durable)
            a.append(durable, 0, 1024, ROWS)
            with pytest.raises(Refused, match="was lost with drive one: its worker died") as caught:
                check(a, volatile)
            assert caught.value.error == "DeviceUnavailable"
            check(b, elsewhere)
            # Idle, too, it is noticed.
            hung = now["one"].device.worker_pid
            os.kill(hung, signal.SIGSTOP)
            wait_for(lambda: drives(b)["one"].device.worker_restarts == 2, 60)
            wait_for(lambda: states(b) == ["serving", "serving"], 60)
            check(a, durable)
            os.kill(drives(b)["one"].device.worker_pid, signal.SIGKILL)
            wait_for(lambda: drives(b)["one"].device.worker_restarts == 3, 60)
            check(b, elsewhere)
            assert drives(b)["two"].device.worker_restarts == 0
        assert daemon.poll() is None
    assert daemon.returncode == 0


def test_a_drive_that_does_not_open_is_tried_until_it_does(runtime_dir: Path, flags: tuple[str, str]) -> None:
    with running_daemon(runtime_dir, *flags), RawClient(runtime_dir) as a, RawClient(runtime_dir) as b:
        for client, name in ((a, "first"), (b, "second")):
            client.save(fill(client, name))
    again = runtime_dir / "again"
    shutil.copy(runtime_dir / "one", runtime_dir / "backup")
    with (runtime_dir / "one").open("r+b") as file:
        file.seek(30)
        file.write(b"\xff")
    with running_daemon(again, *flags), RawClient(again) as client:
        assert states(client) == ["gone", "serving"]
        gone = drives(client)["one"]
        assert gone.reason.startswith(f"the header of the cold pool {runtime_dir}/one is damaged")
        assert (gone.device.driver, gone.device.path) == ("host", f"{runtime_dir}/one")
        assert "drive is gone" in log_of(again)
        shown = subprocess.run(
            [sys.executable, "-m", "hillinferd.ctl", "status", "--socket", str(again / "attach.sock")],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        assert "one is gone: the header of the cold pool" in shown
        check(client, int(client.open_named(SHAPE, base_name="second").context_id))
        check(client, fill(client, "third"))
        for ask in (lambda: client.open_named(SHAPE, base_name="first"), lambda: client.delete("first")):
            with pytest.raises(Refused, match=r"no drive that serves has .*; drive one is gone") as caught:
                ask()
            assert caught.value.error == "UnknownContext"
        assert set(client.durable()) == {"second", "third"}
        (runtime_dir / "backup").rename(runtime_dir / "one")
        wait_for(lambda: states(client) == ["serving", "serving"], 60)
        check(client, int(client.open_named(SHAPE, base_name="first").context_id))
        assert set(client.durable()) == {"first", "second", "third"}


def test_a_daemon_none_of_whose_drives_opens_says_why(runtime_dir: Path, flags: tuple[str, str]) -> None:
    for name in ("one", "two"):
        (runtime_dir / name).write_text(f"years of work on {name}")
    done = subprocess.run(
        [sys.executable, "-m", "hillinferd", "--runtime-dir", str(runtime_dir), *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"hillinferd: pool: {runtime_dir}/one has content that is not a cold pool; name a new file\n"
    )
    assert (runtime_dir / "two").read_text() == "years of work on two"


ABSENT = Path("/dev/nvme97n1")


def test_nothing_is_made_where_a_drive_would_be() -> None:
    if os.stat("/dev").st_dev == os.stat("/").st_dev:
        pytest.skip("/dev is a directory of the system's own file system")
    with pytest.raises(ConfigError, match="plug the drive in"):
        Storage(ABSENT, 1 << 20, keep=True)
    assert not ABSENT.exists()
    loaded = config.load(None, {"pool": ABSENT})
    # As for a drive that is there: all of it, and the catalogue not below /dev.
    assert loaded.drives[0].pool_capacity == 0
    assert catalogue_path(ABSENT, None) == Path("/var/lib/hillinfer/nvme97n1.catalogue")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A formatted loop device."""
    if os.geteuid() != 0 or not shutil.which("losetup") or not Path("/dev/loop-control").exists():
        pytest.skip("loop devices need root, losetup and /dev/loop-control")
    backing = tmp_path / "disk"
    with backing.open("wb") as file:
        file.truncate(64 << 20)
    found = subprocess.run(
        ["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip(f"losetup: {found.stderr.strip()}")
    path = Path(found.stdout.strip())
    try:
        format_device(path)
        yield path
    finally:
        subprocess.run(["losetup", "--detach", str(path)], check=True)


def test_a_device_is_not_formatted_if_its_catalogue_cannot_be_set_aside(
    foreign: tuple[Path, list[str]], device: Path
) -> None:
    place, prefix = foreign
    catalogue = place / f"{device.name}.catalogue"
    catalogue.write_bytes(b"a catalogue")
    place.chmod(0o555)
    before = device.read_bytes()
    line = [*prefix, sys.executable, "-m", "hillinferd.ctl", "format", "--force", str(device)]
    line += ["--state-dir", str(place)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "cannot be set aside" in done.stderr
    assert done.stderr.count("\n") == 1
    assert device.read_bytes() == before
    assert catalogue.read_bytes() == b"a catalogue"


def test_a_device_keeps_contexts_and_is_waited_for(runtime_dir: Path, device: Path) -> None:
    link = runtime_dir / "by_id"
    link.symlink_to(device)
    flags = configured(runtime_dir, link, runtime_dir / "file")
    with running_daemon(runtime_dir / "a", *flags), RawClient(runtime_dir / "a") as client:
        pool = drives(client)["by_id"]
        assert (pool.state, pool.device.path) == ("serving", str(link))
        client.save(fill(client, "book"))
        assert client.durable()["book"].drive == "by_id"
    with running_daemon(runtime_dir / "b", *flags), RawClient(runtime_dir / "b") as client:
        check(client, int(client.open_named(SHAPE, base_name="book").context_id))
    link.unlink()
    link.symlink_to(ABSENT)
    with running_daemon(runtime_dir / "c", *flags), RawClient(runtime_dir / "c") as client:
        assert states(client) == ["gone", "serving"]
        assert "plug the drive in" in drives(client)["by_id"].reason
        check(client, fill(client, "other"))
        link.unlink()
        link.symlink_to(device)
        wait_for(lambda: states(client) == ["serving", "serving"], 60)
        check(client, int(client.open_named(SHAPE, base_name="book").context_id))
        assert {name: item.drive for name, item in client.durable().items()} == {
            "book": "by_id",
            "other": "file",
        }
    assert not ABSENT.exists()
