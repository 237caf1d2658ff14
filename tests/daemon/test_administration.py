from __future__ import annotations

import json
import pwd
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from raw_client import RawClient, Refused, wait_for
from service_thread import drive_settings, served
from test_limits import ROWS, SHAPE
from typer.testing import CliRunner, Result

from hillinfer_core.errors import NotAllowed
from hillinfer_core.protocol import attach_socket, grpc_socket
from hillinferd.ctl import app
from hillinferd.service.limits import Limits
from hillinferd.service.sessions import Peer


def ctl(runtime_dir: Path, *command: str) -> Result:
    # In this process: starting one takes longer than what it does.
    return CliRunner().invoke(app, [*command, "--socket", str(attach_socket(runtime_dir))])


def ctl_json(runtime_dir: Path, *command: str) -> dict[str, Any]:
    done = ctl(runtime_dir, *command, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@contextmanager
def health_of(runtime_dir: Path) -> Iterator[health_pb2_grpc.HealthStub]:
    with grpc.insecure_channel(f"unix:{grpc_socket(runtime_dir)}") as channel:
        yield health_pb2_grpc.HealthStub(channel)


def test_drain_refuses_what_is_new_and_lets_the_rest_go_on(daemon: Path) -> None:
    serving = health_pb2.HealthCheckResponse.SERVING
    with RawClient(daemon) as client, health_of(daemon) as health:
        asked = [health_pb2.HealthCheckRequest(service=name) for name in ("", "hillinfer.v1.ColdPool")]
        context = client.open(SHAPE)
        try:
            state = ctl_json(daemon, "drain")
            assert (state["on"], state["sessions"], state["contexts"]) == (True, 1, 1)
            wait_for(lambda: all(health.Check(each).status != serving for each in asked), 60)
            with pytest.raises(Refused, match="draining") as refused, RawClient(daemon):
                pass
            assert refused.value.error == "Draining"
            with pytest.raises(Refused, match="draining") as refused:
                client.open(SHAPE)
            assert (refused.value.error, refused.value.code) == ("Draining", grpc.StatusCode.UNAVAILABLE)
            client.append(context, 0, 0, ROWS)
            assert ctl_json(daemon, "status")["draining"] is True
            assert ctl(daemon, "drain", "--wait", "0.1").exit_code == 1
        finally:
            assert ctl_json(daemon, "undrain")["on"] is False
        wait_for(lambda: all(health.Check(each).status == serving for each in asked), 60)
        client.open(SHAPE)


def test_drain_waits_until_the_last_has_gone(daemon: Path) -> None:
    command = [sys.executable, "-m", "hillinferd.ctl", "drain", "--wait", "60", "--json"]
    with RawClient(daemon):
        waiting = subprocess.Popen(
            [*command, "--socket", str(attach_socket(daemon))], stdout=subprocess.PIPE, text=True
        )
        with health_of(daemon) as health:
            request, serving = health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse.SERVING
            wait_for(lambda: health.Check(request).status != serving, 60)
        assert waiting.poll() is None
    try:
        out, _ = waiting.communicate(timeout=30)
        assert (waiting.returncode, json.loads(out)["sessions"]) == (0, 0)
    finally:
        ctl(daemon, "undrain")


def test_a_user_sees_their_own_sessions_only(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    with (
        served(tmp_path, drive_settings("one", tmp_path / "pool")) as service,
        RawClient(tmp_path) as mine,
        RawClient(tmp_path) as theirs,
        RawClient(tmp_path) as also_theirs,
    ):
        for client in (theirs, also_theirs):
            session = service.run(lambda client=client: service.service.sessions.by_token(client.token))
            session.peer = Peer(1, nobody.pw_uid)
        numbers = [each.accepted.session_id for each in (mine, theirs, also_theirs)]
        assert [each.session_id for each in mine.status().sessions] == numbers
        status = theirs.status()
        assert [each.session_id for each in status.sessions] == numbers[1:]
        # What concerns everybody is told to everybody.
        assert status.pool == mine.status().pool
        service.run(lambda: service.service.apply_limits(Limits(admin_groups=frozenset({nobody.pw_gid}))))
        assert [each.session_id for each in theirs.status().sessions] == numbers


def test_close_ends_one_session_and_frees_what_it_held(daemon: Path) -> None:
    with RawClient(daemon) as closed, RawClient(daemon) as other:
        context = closed.open(SHAPE)
        closed.append(context, 0, 0, ROWS)
        kept = other.open(SHAPE)
        done = ctl(daemon, "close", str(closed.accepted.session_id))
        assert done.exit_code == 0, done.output
        assert "closed session" in done.stdout
        assert closed.connection.recv(1) == b""
        with pytest.raises(Refused) as refused:
            closed.append(context, 0, 64, ROWS)
        assert refused.value.error == "ForeignToken"
        other.append(kept, 0, 0, ROWS)
        ids = [each["session_id"] for each in ctl_json(daemon, "sessions", "--interval", "0.1")["sessions"]]
        assert ids == [other.accepted.session_id]
    unknown = ctl(daemon, "close", "4000000")
    assert unknown.exit_code == 1
    assert "hillinferctl sessions" in str(unknown.exception)


def test_sessions_and_top_count_what_was_done(daemon: Path) -> None:
    with RawClient(daemon) as client:
        context = client.open(SHAPE)
        client.append(context, 0, 0, ROWS)
        for _ in range(5):
            client.evaluate(context, SHAPE, 0, np.ones((2, 64), np.float32), 4, 0, 64)
        (session,) = ctl_json(daemon, "sessions", "--interval", "0.1")["sessions"]
        usage = session["usage"]
        assert usage["pieces"] == 7
        assert usage["written_bytes"] >= ROWS.nbytes
        assert usage["evaluated_bytes"] > 0
        assert usage["device_s"] > 0
        assert usage["winners"] == usage["missing"] == 5 * 4 * SHAPE.kv_heads
        assert session["rates"]["pieces"] == 0
        shown = ctl_json(daemon, "top", "--interval", "0.1")
        (drive,) = shown["drives"]
        assert drive["usage"]["pieces"] >= 7
        assert drive["usage"]["written_bytes"] >= usage["written_bytes"]
        for command in (("sessions",), ("top", "--once")):
            text = ctl(daemon, *command, "--interval", "0.1")
            assert text.exit_code == 0, text.output
            assert "raw" in text.stdout


def test_only_an_administrator_may_drain_and_close(runtime_dir: Path) -> None:
    with served(runtime_dir, drive_settings("one", runtime_dir / "pool")) as service:
        sessions, administration = service.service.sessions, service.service.administration
        stranger = service.run(lambda: sessions.open("stranger", 0, Peer(1, 4242)))
        for call in (
            lambda: administration.drain(stranger, True),
            lambda: administration.close_session(stranger, stranger.session_id),
        ):
            with pytest.raises(NotAllowed, match="4242"):
                service.run(call)
        assert not sessions.drain.on
        assert not stranger.closing.is_set()


def test_a_group_may_administer_as_soon_as_it_is_configured_and_no_longer(runtime_dir: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    with served(runtime_dir, drive_settings("one", runtime_dir / "pool")) as service:
        sessions, administration = service.service.sessions, service.service.administration
        session = service.run(lambda: sessions.open("admin", 0, Peer(1, nobody.pw_uid)))
        limits = Limits(admin_groups=frozenset({nobody.pw_gid}))
        service.run(lambda: service.service.apply_limits(limits))
        service.run(lambda: administration.drain(session, True))
        assert sessions.drain.on
        service.run(lambda: administration.drain(session, False))
        service.run(lambda: service.service.apply_limits(Limits()))
        with pytest.raises(NotAllowed, match="admin_groups"):
            service.run(lambda: administration.drain(session, True))
        assert not sessions.drain.on


def test_a_user_who_is_not_listed_may_not_attach(runtime_dir: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    with served(runtime_dir, drive_settings("one", runtime_dir / "pool")) as service:
        service.run(lambda: service.service.apply_limits(Limits(attach_users=frozenset({1}))))
        with pytest.raises(NotAllowed, match="attach_users"):
            service.run(lambda: service.service.sessions.open("stranger", 0, Peer(1, nobody.pw_uid)))
        with RawClient(runtime_dir) as own:
            own.open(SHAPE)
