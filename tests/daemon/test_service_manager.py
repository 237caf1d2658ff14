"""What the daemon tells a service manager, and its configuration: everything here without systemd itself."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from raw_client import RawClient, Refused, attach_raw, attach_request, wait_for

from hillinfer_core.errors import DaemonUnavailable
from hillinferd import config, example_config
from hillinferd.journal import EVENTS
from hillinferd.reload import LIVE, Reloader
from hillinferd.service.limits import Limits
from hillinferd.service.progress import GRACE_S, Progress
from hillinferd.service.sessions import Peer, Sessions

SOURCES = Path(config.__file__).parent


class Managed:
    """A daemon started as systemd would: told of a notify socket, a watchdog and a socket that listens."""

    def __init__(self, directory: Path, configuration: Path) -> None:
        self.directory = directory
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notices.bind(str(directory / "notify"))
        self.notices.settimeout(60)
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listening.bind(str(directory / "attach.sock"))
        self.listening.listen()
        # LISTEN_PID is the daemon's own, which only the process itself knows before it begins.
        command = 'exec 3<&"$1"; shift; LISTEN_PID=$$ WATCHDOG_PID=$$ exec "$@"'
        arguments = ["bash", "-c", command, "bash", str(self.listening.fileno())]
        arguments += [sys.executable, "-m", "hillinferd", "--config", str(configuration)]
        environment = {**os.environ, "NOTIFY_SOCKET": str(directory / "notify"), "WATCHDOG_USEC": "600000"}
        environment |= {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "attach"}
        self.log = directory / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                arguments, env=environment, pass_fds=[self.listening.fileno()], stderr=log
            )

    def wait_for(self, state: str) -> None:
        deadline = time.monotonic() + 60
        while state not in self.notices.recv(4096).decode().split("\n"):
            assert time.monotonic() < deadline, self.log.read_text()


@pytest.fixture
def managed(runtime_dir: Path) -> Iterator[Managed]:
    pytest.importorskip("systemd.daemon")
    file = runtime_dir / "hillinferd.toml"
    file.write_text(f'runtime_dir = "{runtime_dir}"\npool = "{runtime_dir}/pool"\npool_capacity = "64MiB"\n')
    daemon = Managed(runtime_dir, file)
    try:
        yield daemon
    finally:
        daemon.process.kill()
        daemon.process.wait()
        daemon.notices.close()
        daemon.listening.close()


def test_a_managed_daemon_takes_its_socket_and_tells_how_it_is(managed: Managed) -> None:
    # Who connects before it is ready waits in the socket.
    connection, reply, fds = attach_raw(managed.directory, attach_request())
    connection.close()
    assert reply.WhichOneof("outcome") == "accepted"
    assert fds == []
    managed.wait_for("READY=1")
    for _ in range(3):
        managed.wait_for("WATCHDOG=1")

    file = managed.directory / "hillinferd.toml"
    good = file.read_text()
    file.write_text(good + "session_limit = 1\nrequest_timeout = 7\n")
    managed.process.send_signal(signal.SIGHUP)
    managed.wait_for("RELOADING=1")
    managed.wait_for("READY=1")
    with RawClient(managed.directory), pytest.raises(Refused, match="session_limit"):
        RawClient(managed.directory)
    file.write_text("session_limit = 0\n")
    managed.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "configuration not reloaded" in managed.log.read_text(), 60)
    assert "need a restart of the daemon to apply keys=request_timeout" in managed.log.read_text()

    managed.process.send_signal(signal.SIGTERM)
    managed.wait_for("STOPPING=1")
    assert managed.process.wait(60) == 0
    # The socket is systemd's: the next daemon finds who waits in it.
    assert (managed.directory / "attach.sock").is_socket()
    assert not (managed.directory / "grpc.sock").exists()


def test_what_stands_still_keeps_the_watchdog_hungry() -> None:
    now = 0.0
    queue = SimpleNamespace(done=0, busy=True)
    worker = SimpleNamespace(exchanges=0, restarts=0)
    settings = SimpleNamespace(request_timeout_s=100.0)
    drive: Any = type("Drive", (), {})()
    drive.__dict__.update(name="d", queue=queue, worker=worker, settings=settings, supervised=True)
    progress = Progress([drive], lambda: now)
    # A worker that hangs for as long as it may is the supervisor's business.
    now = 100.0
    assert not progress.stalled()
    worker.restarts += 1
    assert not progress.stalled()
    now += 100 + GRACE_S + 1
    assert "stands still" in progress.stalled()
    queue.done += 1
    assert not progress.stalled()
    queue.busy = False
    now += 1000
    assert not progress.stalled()
    drive.supervised = False
    assert "not supervised" in progress.stalled()


def test_the_file_of_the_package_has_every_key_and_only_what_is_allowed(tmp_path: Path) -> None:
    text = example_config.text()
    loaded = config.build(tomllib.loads(text))
    assert loaded.drives[0].pool == Path("/var/lib/hillinfer/pool")
    assert loaded.limits == config.build({}).limits
    keys = {key.name for key in (*config.KEYS, *config.DRIVE_KEYS)}
    shown = re.findall(r"^#?(\w+) = (.*)$", text, re.MULTILINE)
    assert [name for name, _ in shown] == [key.name for key in (*config.KEYS, *config.DRIVE_KEYS)]
    assert keys >= LIVE
    for name, value in shown:
        if name == "configurations":  # must exist
            value = f'"{tmp_path}"'
        config.build(tomllib.loads(f"{name} = {value}"))


def test_a_reload_tells_live_changes_from_those_that_wait(tmp_path: Path) -> None:
    file = tmp_path / "hillinferd.toml"
    file.write_text('log_level = "info"\n')
    reloader = Reloader(file, {"pool": tmp_path / "pool"}, config.read(file, {"pool": tmp_path / "pool"}))
    file.write_text('log_level = "debug"\nrequest_timeout = 7\npool = "/elsewhere"\n')
    change = reloader.reload()
    # What the command line says stays, whatever the file says.
    assert (change.applied, change.restart) == (["log_level"], ["request_timeout"])
    assert change.settings.log_level == "debug"
    again = reloader.reload()
    assert (again.applied, again.restart) == ([], ["request_timeout"])


async def _refusals() -> None:
    sessions = Sessions(Limits())
    session = sessions.open("a", 0, Peer(1, 1))
    with sessions.request(session):
        assert not await sessions.finish(0.05)
        with pytest.raises(DaemonUnavailable, match="stopping"), sessions.request(session):
            pass
        with pytest.raises(DaemonUnavailable, match="stopping"):
            sessions.open("b", 0, Peer(1, 1))
    assert await sessions.finish(5)


def test_a_stop_refuses_what_is_new_and_waits_for_what_is_in_flight() -> None:
    asyncio.run(_refusals())


def test_every_event_with_an_id_is_logged_somewhere() -> None:
    text = "".join(file.read_text() for file in SOURCES.rglob("*.py") if file.name != "journal.py")
    logged = set(re.findall(r'log\.\w+\(\s*"([^"]+)"', text))
    assert set(EVENTS) <= logged
    assert len(set(EVENTS.values())) == len(EVENTS)
