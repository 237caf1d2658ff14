"""Sessions, clients and daemons that come and go: nothing leaks, and no byte is ever wrong.

What is there before and after is printed and must be the same; memory may differ by a little.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from killed_clients import ROWS, SHAPE
from raw_client import RawClient, log_of, running_daemon, wait_for

QUERY = np.ones((2, 64), np.float32)
MEMORY_SLACK = 8 << 20
"""Bytes of resident memory that two measurements may differ by: allocators keep what they had."""


@dataclass(frozen=True)
class Held:
    """What the daemon and its worker hold."""

    daemon_fds: Counter[str]
    worker_fds: Counter[str]
    daemon_arenas: int
    worker_arenas: int
    threads: int
    pool_bytes: int
    extents: int
    key_bytes: int
    sessions: int
    memory: int

    def same_but_for_memory(self, other: Held) -> bool:
        """Whether it is what it was before, which may have had a thread of gRPC's more."""
        apart = {"memory": 0, "threads": 0}
        return {**vars(self), **apart} == {**vars(other), **apart} and self.threads <= other.threads


def held(watcher: RawClient, daemon_pid: int) -> Held:
    status = watcher.status()
    worker_pid = status.device.worker_pid
    return Held(
        fds(daemon_pid),
        fds(worker_pid),
        maps(daemon_pid),
        maps(worker_pid),
        len(list(Path(f"/proc/{daemon_pid}/task").iterdir())),
        status.pool.used_bytes,
        status.pool.extents,
        status.device.evaluation_key_bytes,
        len(status.sessions),
        resident(daemon_pid) + resident(worker_pid),
    )


def fds(pid: int) -> Counter[str]:
    """Open descriptors by kind: sockets, pipes, memory, files."""
    kinds: Counter[str] = Counter()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            kinds[os.readlink(link).partition(":")[0].split(" ")[0]] += 1
        except FileNotFoundError:
            continue
    return kinds


def maps(pid: int) -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("hillinfer-arena")


def resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS"))


def settles(measure: Callable[[], Held], before: Held) -> Held:
    """Return what is held once it is what was before, or after a minute what there is then."""
    deadline = time.monotonic() + 60
    while True:
        now = measure()
        if now.same_but_for_memory(before) or time.monotonic() > deadline:
            return now
        time.sleep(0.05)


def compare(before: Held, after: Held) -> None:
    print(f"before: {before}\nafter:  {after}")
    assert after.same_but_for_memory(before)
    assert after.memory - before.memory < MEMORY_SLACK


def check(client: RawClient, context: int) -> None:
    np.testing.assert_array_equal(client.fetch_range(context, SHAPE, 0, 0, 256), ROWS)


def use_a_session(runtime_dir: Path, number: int) -> None:
    """Attach, fill, ask, check, and leave: in order, or with everything open."""
    with RawClient(runtime_dir, 1 << 20) as client:
        context = client.open(SHAPE)
        client.append(context, 0, 0, ROWS)
        ids, _, rows, _ = client.evaluate(context, SHAPE, 0, QUERY, 8, 0, 256, room=16)
        assert np.array_equal(rows, np.concatenate([ROWS[head, ids[head]] for head in range(2)]))
        if number % 2:
            check(client, context)
            client.close_context(context)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.timeout(1200)
def test_sessions_that_come_and_go_leave_nothing(runtime_dir: Path, count: int) -> None:
    with running_daemon(runtime_dir) as daemon, RawClient(runtime_dir) as watcher:
        kept = watcher.open(SHAPE)
        watcher.append(kept, 0, 0, ROWS)
        for number in range(count // 10):
            use_a_session(runtime_dir, number)
        before = measured(watcher, daemon.pid)
        for number in range(count):
            use_a_session(runtime_dir, number)
        compare(before, settles(lambda: held(watcher, daemon.pid), before))
        check(watcher, kept)
        assert watcher.status().device.worker_restarts == 0
    assert not list(runtime_dir.glob("*.sock"))


@pytest.mark.parametrize("count", [50, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.timeout(600)
def test_clients_killed_at_work_leave_nothing(runtime_dir: Path, count: int) -> None:
    at_once = 5
    moments = random.Random(0)
    with running_daemon(runtime_dir) as daemon, RawClient(runtime_dir) as watcher:
        kept = watcher.open(SHAPE)
        watcher.append(kept, 0, 0, ROWS)
        command = [sys.executable, str(Path(__file__).with_name("killed_clients.py"))]
        with subprocess.Popen(
            [*command, str(runtime_dir), str(at_once)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as clients:
            assert clients.stdin is not None
            assert clients.stdout is not None

            def kill_some() -> None:
                print(file=clients.stdin, flush=True)
                for pid in map(int, clients.stdout.readline().split()):
                    time.sleep(moments.uniform(0, 0.02))
                    os.kill(pid, signal.SIGKILL)
                assert clients.stdout.readline() == "killed\n"

            kill_some()
            before = measured(watcher, daemon.pid)
            for _ in range(count // at_once):
                kill_some()
            compare(before, settles(lambda: held(watcher, daemon.pid), before))
            clients.stdin.close()
        check(watcher, kept)
        assert watcher.status().device.worker_restarts == 0


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.long)])
@pytest.mark.timeout(600)
def test_a_daemon_restarted_again_and_again_keeps_what_is_durable_and_nothing_else(
    runtime_dir: Path, count: int
) -> None:
    flags = ("--pool", str(runtime_dir / "pool"), "--pool-capacity", "64MiB")
    with running_daemon(runtime_dir, *flags), RawClient(runtime_dir) as client:
        context = client.open_named(SHAPE, durable_name="kept").context_id
        client.append(context, 0, 0, ROWS)
        client.save(context)
        client.close_context(context)
        used, extents = client.status().pool.used_bytes, client.status().pool.extents
    files = sorted(path.name for path in runtime_dir.iterdir())
    blocks = (runtime_dir / "pool").stat().st_blocks
    print(f"before: {used} bytes in {extents} extents, {blocks} blocks, {files}")
    for number in range(count):
        (runtime_dir / "log").unlink()
        with running_daemon(runtime_dir, *flags) as daemon, RawClient(runtime_dir) as client:
            assert (client.status().pool.used_bytes, client.status().pool.extents) == (used, extents)
            check(client, client.open_named(SHAPE, base_name="kept").context_id)
            # What was volatile goes with the daemon, however that ends.
            client.append(client.open(SHAPE), 0, 0, ROWS)
            worker = client.status().device.worker_pid
            if number % 2:
                daemon.send_signal(signal.SIGKILL)
                daemon.wait(60)
        assert "Traceback" not in log_of(runtime_dir)
        wait_for(lambda worker=worker: not Path(f"/proc/{worker}").exists(), 60)  # type: ignore[misc]
    (runtime_dir / "log").unlink()
    with running_daemon(runtime_dir, *flags), RawClient(runtime_dir) as client:
        pool = client.status().pool
        assert (pool.used_bytes, pool.extents) == (used, extents)
        check(client, client.open_named(SHAPE, base_name="kept").context_id)
    after = sorted(path.name for path in runtime_dir.iterdir())
    blocks_after = (runtime_dir / "pool").stat().st_blocks
    print(f"after:  {pool.used_bytes} bytes in {pool.extents} extents, {blocks_after} blocks, {after}")
    assert after == files
    assert blocks_after <= blocks


def measured(watcher: RawClient, daemon_pid: int) -> Held:
    """Return what is held once the sessions that ended are gone."""
    wait_for(lambda: len(watcher.status().sessions) == 1, 60)
    time.sleep(0.2)
    return held(watcher, daemon_pid)
