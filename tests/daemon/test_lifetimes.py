"""Who dies, and what is freed then: clients, workers and daemons, while work is in flight."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from one_context import QUERY, ROWS, SHAPE, check, fill
from raw_client import RawClient, Refused, log_of, running_daemon, wait_for

from hillinfer_core.v1 import cold_pool_pb2 as pb


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


CLIENT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from one_context import fill
from raw_client import RawClient
client = RawClient(Path(sys.argv[1]))
for _ in range(3):
    fill(client)
print("filled", flush=True)
time.sleep(600)
"""


def test_a_killed_client_frees_everything(daemon: Path) -> None:
    with RawClient(daemon) as watcher:
        context = fill(watcher)
        before = watcher.status()
        command = [sys.executable, "-c", CLIENT, str(daemon), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "filled\n"
            during = watcher.status()
            assert during.pool.used_bytes == 4 * before.pool.used_bytes
            assert {session.pid for session in during.sessions} == {os.getpid(), process.pid}
            process.kill()
            wait_for(lambda: watcher.status().pool == before.pool, 60)
            after = watcher.status()
        assert [each.session_id for each in after.sessions] == [each.session_id for each in before.sessions]
        assert after.device.evaluation_key_bytes == before.device.evaluation_key_bytes
        check(watcher, context)


def test_hang_up_while_work_is_in_flight_is_safe(daemon: Path) -> None:
    with RawClient(daemon) as watcher:
        context = fill(watcher)
        before = watcher.status().pool
        for attempt in range(8):
            client = RawClient(daemon, 16 << 20)
            errors: list[str] = []

            def work(client: RawClient = client, errors: list[str] = errors) -> None:
                try:
                    context, first = client.open(SHAPE), 0
                    while True:
                        client.append(context, 0, first, ROWS)
                        first += ROWS.shape[1]
                        client.evaluate(context, SHAPE, 0, QUERY, 500, 0, first, room=1000)
                except Refused as error:
                    errors.append(error.error)

            thread = threading.Thread(target=work)
            thread.start()
            time.sleep(0.03 * attempt)
            client.connection.close()
            thread.join(60)
            client.channel.close()
            assert errors == ["ForeignToken"]
        wait_for(lambda: watcher.status().pool == before, 60)
        check(watcher, context)
        assert watcher.status().device.worker_restarts == 0


def test_hang_up_while_the_worker_is_busy_frees_once_it_is_not(daemon: Path) -> None:
    with RawClient(daemon) as watcher:
        context = fill(watcher)
        before = watcher.status()
        client = RawClient(daemon)
        fill(client)
        errors: list[str] = []

        def work() -> None:
            try:
                client.append(fill_context, 0, 0, ROWS)
            except Refused as error:
                errors.append(error.error)

        fill_context = client.open(SHAPE)
        with stopped(before.device.worker_pid):
            thread = threading.Thread(target=work)
            thread.start()
            time.sleep(0.2)
            client.connection.close()
            wait_for(lambda: len(watcher.status().sessions) == 1, 60)
        thread.join(60)
        client.channel.close()
        wait_for(lambda: watcher.status().pool == before.pool, 60)
        check(watcher, context)


def test_closing_a_context_while_it_is_used_is_safe(daemon: Path) -> None:
    with RawClient(daemon, 16 << 20) as client:
        for _ in range(5):
            context = fill(client)
            seen: list[str] = []

            def work(context: int = context, seen: list[str] = seen) -> None:
                try:
                    while True:
                        client.evaluate(context, SHAPE, 0, QUERY, 500, 0, 4096, room=1000)
                except Refused as error:
                    seen.append(error.error)

            thread = threading.Thread(target=work)
            thread.start()
            time.sleep(0.02)
            client.call("CloseContext", pb.CloseContextRequest(context_id=context))
            thread.join(60)
            assert seen == ["UnknownContext"]
        assert client.status().pool.used_bytes == 0


def test_a_deadline_ends_a_call_and_the_next_one_works(daemon: Path) -> None:
    with RawClient(daemon) as client:
        context = fill(client)
        with stopped(client.status().device.worker_pid):
            request = pb.FetchRequest(
                context_id=context,
                range=pb.TokenRange(first_token=0, count=16),
                rows=client.region(0, 16 * 2 * SHAPE.row_bytes),
            )
            for _ in range(3):
                with pytest.raises(Refused) as caught:
                    client.call("Fetch", request, timeout=0.3)
                assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert client.status().version
        check(client, context)


def test_a_dead_worker_costs_its_contexts_and_nothing_else(runtime_dir: Path) -> None:
    with running_daemon(runtime_dir), RawClient(runtime_dir) as client, RawClient(runtime_dir) as other:
        lost, also_lost = fill(client), fill(other)
        os.kill(client.status().device.worker_pid, signal.SIGKILL)
        wait_for(lambda: client.status().device.worker_restarts == 1, 60)
        for session, context in ((client, lost), (other, also_lost)):
            with pytest.raises(Refused, match="open and fill a new one") as caught:
                check(session, context)
            assert caught.value.error == "DeviceUnavailable"
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        wait_for(lambda: "device worker restarted" in log_of(runtime_dir), 60)
        # The same sessions and arenas go on with new contexts.
        for session, context in ((client, lost), (other, also_lost)):
            check(session, fill(session))
            session.call("CloseContext", pb.CloseContextRequest(context_id=context))
            check(session, fill(session))
        contexts = [len(session.contexts) for session in client.status().sessions]
        assert contexts == [2, 2]
        keys = client.status().device.evaluation_key_bytes
        assert keys == 4 * 4096 * 2 * 64 // 2


def test_health_follows_the_worker(runtime_dir: Path) -> None:
    with (
        running_daemon(runtime_dir),
        RawClient(runtime_dir) as client,
        grpc.insecure_channel(f"unix:{runtime_dir}/grpc.sock") as channel,
    ):
        request = health_pb2.HealthCheckRequest(service="hillinfer.v1.ColdPool")
        states = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=30)
        assert next(states).status == health_pb2.HealthCheckResponse.SERVING
        os.kill(client.status().device.worker_pid, signal.SIGKILL)
        assert next(states).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert next(states).status == health_pb2.HealthCheckResponse.SERVING
        states.cancel()
        check(client, fill(client))


def test_work_in_flight_fails_when_the_worker_dies(runtime_dir: Path) -> None:
    with running_daemon(runtime_dir), RawClient(runtime_dir) as client:
        context, pid = fill(client), client.status().device.worker_pid
        errors: list[str] = []

        def work() -> None:
            try:
                check(client, context)
            except Refused as error:
                errors.append(error.error)

        os.kill(pid, signal.SIGSTOP)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        for thread in threads:
            thread.join(60)
        assert errors == ["DeviceUnavailable"] * 4


def test_a_stopped_daemon_leaves_nothing_and_tells_its_clients(runtime_dir: Path) -> None:
    with running_daemon(runtime_dir) as process:
        client = RawClient(runtime_dir)
        fill(client)
        worker = client.status().device.worker_pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert client.connection.recv(1) == b""
        with pytest.raises(Refused) as caught:
            client.status()
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        client.channel.close()
    wait_for(lambda: not alive(worker), 60)
    left = {path.name for path in runtime_dir.rglob("*")}
    assert left == {"lock", "log", "hillinfer"}
    assert log_of(runtime_dir).rstrip().endswith("stopped")
    assert "error" not in log_of(runtime_dir)


@pytest.mark.parametrize("asked", [True, False])
def test_a_daemon_stops_beside_a_worker_that_hangs(runtime_dir: Path, asked: bool) -> None:
    with running_daemon(runtime_dir) as process, RawClient(runtime_dir) as client:
        context, worker = fill(client), client.status().device.worker_pid
        told: list[str] = []

        def work() -> None:
            try:
                check(client, context)
            except Refused as error:
                told.append(error.error)

        thread = threading.Thread(target=work)
        os.kill(worker, signal.SIGSTOP)
        if asked:
            thread.start()
            time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        # As long as the unit's TimeoutStopSec, half of what a request may take.
        assert process.wait(30) == 0
        if asked:
            thread.join(60)
            assert len(told) == 1
        assert not alive(worker)
    assert log_of(runtime_dir).rstrip().endswith("stopped")


def test_a_killed_daemon_takes_its_worker_along_and_another_can_start(runtime_dir: Path) -> None:
    with running_daemon(runtime_dir) as process, RawClient(runtime_dir) as client:
        worker = client.status().device.worker_pid
        os.kill(worker, signal.SIGSTOP)
        process.kill()
        process.wait(60)
        assert client.connection.recv(1) == b""
        wait_for(lambda: not alive(worker), 60)
    (runtime_dir / "log").unlink()
    with running_daemon(runtime_dir), RawClient(runtime_dir) as client:
        check(client, fill(client))


def test_a_second_daemon_refuses_and_the_first_goes_on(daemon: Path, tmp_path: Path) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "hillinferd", "--runtime-dir", str(daemon)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert "another hillinferd" in second.stderr
    with RawClient(daemon) as client:
        check(client, fill(client))


def test_files_where_it_is_started_are_no_modules_of_its_own(tmp_path: Path) -> None:
    for name in ("random", "numpy", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not of this directory')")
    start = (
        "from hillinfer import PrivateDaemon, Session\n"
        "with PrivateDaemon() as daemon: Session.connect(daemon.socket).close()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", start],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


PARENT = """
import subprocess, sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from raw_client import spawn
print(spawn(Path(sys.argv[1]), "--die-with-parent").pid, flush=True)
time.sleep(600)
"""


def test_a_daemon_can_die_with_its_parent(runtime_dir: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(runtime_dir), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait_for(lambda: " ready " in log_of(runtime_dir), 60)
        assert alive(pid)
        parent.kill()
    wait_for(lambda: not alive(pid), 60)
    assert not (runtime_dir / "attach.sock").exists()


def test_a_client_that_leaves_without_a_word_is_no_session(daemon: Path) -> None:
    for _ in range(20):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(daemon / "attach.sock"))
    with RawClient(daemon) as client:
        wait_for(lambda: len(client.status().sessions) == 1, 60)


def test_only_owner_and_group_may_connect(daemon: Path) -> None:
    for name in ("attach.sock", "grpc.sock"):
        assert (daemon / name).stat().st_mode & 0o777 == 0o660
