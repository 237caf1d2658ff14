"""Several applications on one daemon, and deaths on either side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from kv_rows import random_kv, random_query

from hillinfer import DType, EvaluateItem, PrivateDaemon, Session, Shape, errors
from hillinfer_core.v1 import cold_pool_pb2

SHAPE = Shape(layers=1, kv_heads=2, head_dim=64, dtype=DType.float16)
PEER = Path(__file__).with_name("peer.py")


@contextmanager
def peer(daemon: PrivateDaemon, seed: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(PEER), str(daemon.socket), str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def held_by(status: cold_pool_pb2.StatusResponse, name: str) -> int:
    return sum(
        context.extent_bytes
        for session in status.sessions
        if session.client_name == name
        for context in session.contexts
    )


def test_a_killed_application_is_freed_and_does_not_disturb_another(daemon: PrivateDaemon) -> None:
    with ExitStack() as stack:
        onlooker = stack.enter_context(Session.connect(daemon.socket, arena_bytes=0))
        doomed = stack.enter_context(peer(daemon, 1))
        survivor = stack.enter_context(peer(daemon, 2))
        before = onlooker.status()
        assert held_by(before, "peer 1") > 0
        assert held_by(before, "peer 2") > 0
        assert before.pool.used_bytes == held_by(before, "peer 1") + held_by(before, "peer 2")
        pids = {session.client_name: session.pid for session in before.sessions}
        assert pids["peer 1"] == doomed.pid

        doomed.kill()
        kept = held_by(before, "peer 2")
        assert wait_until(lambda: onlooker.status().pool.used_bytes == kept, 60)
        after = onlooker.status()
        assert held_by(after, "peer 2") == kept
        assert "peer 1" not in {session.client_name for session in after.sessions}

        output, _ = survivor.communicate("stop\n", timeout=30)
        assert survivor.returncode == 0
        assert output.startswith("right ")


def test_threads_share_a_session(session: Session) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            keys, values = random_kv(SHAPE, 1024, seed)
            with session.open_context(SHAPE) as context:
                context.append(0, keys, values)
                item = EvaluateItem(context, random_query(2, 64), 9, 0, 1024, np.empty((2, 0), np.uint32))
                for _ in range(50):
                    [brought] = session.evaluate_and_bring(0, [item])
                    expected = np.take_along_axis(keys, brought.ids[:, :, None].astype(np.int64), axis=1)
                    np.testing.assert_array_equal(brought.rows[:, 0], expected.reshape(-1, 64))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.fixture
def own_daemon() -> Iterator[PrivateDaemon]:
    with PrivateDaemon() as running:
        yield running


def a_context(session: Session) -> EvaluateItem:
    context = session.open_context(SHAPE)
    context.append(0, *random_kv(SHAPE, 1024))
    return EvaluateItem(context, random_query(2, 64), 9, 0, 1024, np.empty((2, 0), np.uint32))


def evaluate_for_ever(item: EvaluateItem) -> None:
    while True:
        item.context.session.evaluate_and_bring(0, [item])


def test_a_killed_daemon_is_an_error_not_a_hang(own_daemon: PrivateDaemon) -> None:
    with Session.connect(own_daemon.socket, timeout_s=10, restart_s=0.5) as session:
        item = a_context(session)
        session.evaluate_and_bring(0, [item])
        os.kill(own_daemon.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(errors.DaemonUnavailable):
                session.evaluate_and_bring(0, [item])
            with pytest.raises(errors.DaemonUnavailable):
                item.context.fetch_range(0, 0, 16)
            with pytest.raises(errors.DaemonUnavailable):
                session.status()
    with pytest.raises(errors.DaemonUnavailable):
        Session.connect(own_daemon.socket)


def test_a_daemon_killed_during_an_evaluation(own_daemon: PrivateDaemon) -> None:
    with Session.connect(own_daemon.socket, timeout_s=60) as session:
        item = a_context(session)
        threading.Timer(0.5, os.kill, (own_daemon.pid, signal.SIGKILL)).start()
        with pytest.raises(errors.DaemonUnavailable):
            evaluate_for_ever(item)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


REFUSAL = "did not finish, the shared memory may still be in use; connect a new session"


def test_a_daemon_that_hangs_is_a_deadline_exceeded_and_a_new_session_then_works(
    own_daemon: PrivateDaemon,
) -> None:
    with Session.connect(own_daemon.socket, timeout_s=20) as session:
        item = a_context(session)
        [before] = session.evaluate_and_bring(0, [item])
        session.timeout_s = 0.5
        with stopped(own_daemon.pid):
            with pytest.raises(errors.DeadlineExceeded):
                session.status()
            with pytest.raises(errors.DeadlineExceeded):
                session.evaluate_and_bring(0, [item])
            with pytest.raises(errors.DeadlineExceeded):
                Session.connect(own_daemon.socket, timeout_s=0.2)
        session.timeout_s = 20.0
        assert wait_until(lambda: len(session.status().sessions) == 1, 60)
        with pytest.raises(errors.DaemonUnavailable, match=REFUSAL):
            session.evaluate_and_bring(0, [item])
    with Session.connect(own_daemon.socket, timeout_s=20) as session:
        [after] = session.evaluate_and_bring(0, [a_context(session)])
        np.testing.assert_array_equal(after.ids, before.ids)


def test_a_status_that_times_out_does_not_end_the_session(own_daemon: PrivateDaemon) -> None:
    with Session.connect(own_daemon.socket, timeout_s=20) as session:
        item = a_context(session)
        session.timeout_s = 0.3
        with stopped(own_daemon.pid), pytest.raises(errors.DeadlineExceeded):
            session.status()
        session.timeout_s = 20
        session.evaluate_and_bring(0, [item])


def evaluate(item: EvaluateItem) -> None:
    item.context.session.evaluate_and_bring(0, [item])


def select(item: EvaluateItem) -> None:
    item.context.evaluate(0, item.query, item.k)


def fetch(item: EvaluateItem) -> None:
    item.context.fetch_range(0, 0, 1024)


def append(item: EvaluateItem) -> None:
    item.context.append(0, *random_kv(SHAPE, 1024, 2))


@pytest.mark.parametrize("unfinished", [evaluate, select, fetch, append])
def test_shared_memory_that_the_daemon_may_still_use_is_not_used_again(
    own_daemon: PrivateDaemon, unfinished: Callable[[EvaluateItem], None]
) -> None:
    keys, values = random_kv(SHAPE, 4096, 3)
    with Session.connect(own_daemon.socket, timeout_s=20) as session:
        item = a_context(session)
        evaluate(item)
        worker = session.status().device.worker_pid
        session.timeout_s = 0.5
        with stopped(worker):
            with pytest.raises(errors.DeadlineExceeded):
                unfinished(item)
            # The worker, once it goes on, would write over these rows or read them for others.
            with pytest.raises(errors.DaemonUnavailable, match=REFUSAL):
                item.context.append(0, keys, values)
        session.timeout_s = 20
        assert session.status().device.worker_restarts == 0
        for use in (evaluate, select, fetch, append):
            with pytest.raises(errors.DaemonUnavailable, match=REFUSAL):
                use(item)
        with pytest.raises(errors.DaemonUnavailable, match=REFUSAL):
            item.context.append(0, keys[:, :1], values[:, :1])
        with pytest.raises(errors.DaemonUnavailable, match=REFUSAL):
            session.open_context(SHAPE)
        item.context.close()
        assert session.status().pool.used_bytes == 0
    with Session.connect(own_daemon.socket, timeout_s=20) as session:
        context = session.open_context(SHAPE)
        context.append(0, keys, values)
        np.testing.assert_array_equal(context.fetch_range(0, 0, 4096), np.stack([keys, values], axis=2))


class Interruption(BaseException):
    """As KeyboardInterrupt, which would end the test run when it came at the wrong moment."""


@pytest.mark.parametrize("unfinished", [evaluate, append])
def test_an_interrupted_call_counts_as_unfinished(
    own_daemon: PrivateDaemon, unfinished: Callable[[EvaluateItem], None]
) -> None:
    def interrupt(*_: object) -> None:
        raise Interruption

    with Session.connect(own_daemon.socket, timeout_s=20) as session:
        item = a_context(session)
        previous = signal.signal(signal.SIGALRM, interrupt)
        try:
            with stopped(session.status().device.worker_pid):
                signal.setitimer(signal.ITIMER_REAL, 0.5)
                with pytest.raises(Interruption):
                    unfinished(item)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        with pytest.raises(errors.DaemonUnavailable, match=REFUSAL):
            append(item)
        item.context.close()
        session.status()


def test_an_error_that_the_daemon_answers_with_does_not_end_the_session(session: Session) -> None:
    item = a_context(session)
    beyond = item._replace(end=5000)
    for _ in range(2):
        with pytest.raises(errors.InvalidInput):
            evaluate(beyond)
        evaluate(item)
    keys, values = random_kv(SHAPE, 1024, 2)
    keys[0, 0, 0] = np.nan
    with pytest.raises(errors.InvalidInput):
        item.context.append(0, keys, values)
    append(item)


def test_a_private_daemon_dies_with_the_process_that_started_it() -> None:
    code = (
        "from hillinfer import PrivateDaemon\n"
        "import time\n"
        "with PrivateDaemon() as daemon:\n"
        "    print(daemon.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert wait_until(lambda: not is_running(pid), 60)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
