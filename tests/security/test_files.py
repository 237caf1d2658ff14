"""What lies in the file system: nobody else can read it, replace it, or be led to another's."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from honest import SHAPE, Honest
from raw_client import (
    CALL_S,
    RawClient,
    Refused,
    attach_raw,
    attach_request,
    random_rows,
    running_daemon,
    spawn,
)

from hillinfer_core import protocol
from hillinfer_core.errors import ConfigError
from hillinferd.process import make_runtime_dir

NOBODY = 65534
ROOT = Path(__file__).parents[2]


def test_udev_gives_drives_to_the_service_and_not_to_those_who_may_attach() -> None:
    rules = [line for line in (ROOT / "systemd/udev.rules").read_text().splitlines() if "MODE=" in line]
    assert len(rules) == 2
    for rule in rules:
        assert 'OWNER="hillinfer", GROUP="root", MODE="0600"' in rule


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_pool_and_catalogue_are_for_the_daemon_alone_whatever_the_umask(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    runtime, pool = tmp_path / "r", tmp_path / "pool"
    runtime.mkdir(0o700)
    flags = ("--pool", str(pool), "--pool-capacity", "8MiB")
    with _umask(0), running_daemon(runtime, *flags), RawClient(runtime) as client:
        context = client.open_named(SHAPE, durable_name="diary").context_id
        client.append(context, 0, 0, random_rows(np.random.default_rng(0), SHAPE, 64))
        found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("pool*")}
        shm = [path for path in Path("/dev/shm").iterdir() if "hillinfer-arena" in path.name]
    assert len(found) >= 4  # pool, catalogue, its log and its counter
    assert set(found.values()) == {0o600}, found
    assert not shm


def test_a_pool_that_is_not_kept_has_no_name(tmp_path: Path) -> None:
    runtime = tmp_path / "r"
    with running_daemon(runtime), RawClient(runtime, 0) as client:
        worker = client.status().device.worker_pid
        links = [os.readlink(path) for path in Path(f"/proc/{worker}/fd").iterdir()]
    [pool] = [link for link in links if "/pool-" in link]
    assert pool.endswith(" (deleted)")
    assert not Path(pool.removesuffix(" (deleted)")).exists()


def test_nobody_else_can_map_an_arena(daemon: Path, attacker: RawClient) -> None:
    """Not by the daemon's, the worker's or the client's descriptors, of another user."""
    if os.getuid():
        pytest.skip("needs root, to be two users")
    pids = [int((daemon / "lock").read_text()), attacker.status().device.worker_pid, os.getpid()]
    code = (
        "import os, sys\n"
        "for pid in sys.argv[1:]:\n"
        "    for where in ('fd', 'map_files', 'mem'):\n"
        "        path = f'/proc/{pid}/{where}'\n"
        "        try: os.open(path, os.O_RDONLY) if where == 'mem' else os.listdir(path)\n"
        "        except PermissionError: continue\n"
        "        sys.exit(f'{path} is open')\n"
    )
    command = ["/usr/bin/env", "python3", "-c", code, *map(str, pids)]
    subprocess.run(command, user=NOBODY, group=NOBODY, extra_groups=[], timeout=CALL_S, check=True)


@pytest.mark.parametrize("mode", [0o777, 0o707])
def test_a_runtime_directory_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "r"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(ConfigError, match="others could replace the sockets"):
        make_runtime_dir(directory)
    process = spawn(directory)
    assert process.wait(60) == 1
    assert not (directory / "attach.sock").exists()


def test_a_runtime_directory_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    monkeypatch.setattr(os, "stat", _owned_by_another)
    with pytest.raises(ConfigError, match="others could replace"):
        make_runtime_dir(tmp_path)


def _owned_by_another(*_: object, **__: object) -> os.stat_result:
    return os.stat_result((0o40700, 0, 0, 2, 4243, 0, 0, 0, 0, 0))


def test_a_client_is_not_led_to_a_directory_that_somebody_else_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HILLINFER_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(protocol, "_SYSTEM_RUNTIME_DIR", tmp_path / "none")
    monkeypatch.setattr(protocol, "_TEMPORARY", tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: 424242)
    assert protocol.default_runtime_dir() == tmp_path / "hillinfer-424242"
    # What this process makes belongs to another than 424242.
    (tmp_path / "hillinfer-424242").mkdir()
    with pytest.raises(ConfigError, match="HILLINFER_RUNTIME_DIR"):
        protocol.default_runtime_dir()


@pytest.mark.parametrize("name", ["\x1b]0;all is well\x07", "a\nb", "a\x00b", "\u202etxt"])
def test_names_that_would_steer_a_terminal_are_refused(daemon: Path, honest: Honest, name: str) -> None:
    connection, reply, _ = attach_raw(daemon, attach_request(client_name=name))
    connection.close()
    assert reply.refused.error == "InvalidInput"
    assert name not in reply.refused.message
    with RawClient(daemon) as client, pytest.raises(Refused) as caught:
        client.open_named(SHAPE, durable_name=name)
    assert caught.value.error == "InvalidInput"
    assert name not in (daemon / "log").read_text()
