from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from raw_client import RawClient

from hillinfer_core.errors import ConfigError
from hillinferd import config


def run(*command: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    line = [*prefix, sys.executable, "-m", *command]
    return subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)


def test_command_line_wins_over_file_and_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "hillinferd.toml"
    file.write_text(f'pool = "{tmp_path}/pool"\npool_capacity = "2GiB"\nevaluation_keys_dram = 1048576\n')
    loaded = config.load(file, {"pool_capacity": "1GiB", "log_level": None})
    assert [drive.pool for drive in loaded.drives] == [tmp_path / "pool"]
    assert loaded.drives[0].pool_capacity == 1 << 30
    assert loaded.drives[0].evaluation_keys_dram == 1 << 20
    assert loaded.log_level == "info"


def test_defaults_need_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there"))
    loaded = config.load(None, {})
    assert loaded.drives[0].pool is None
    assert 0 < loaded.drives[0].pool_capacity <= config.LARGEST_DEFAULT_POOL
    assert loaded.pool_dir == tmp_path / "not" / "there" / "hillinfer"


def test_several_drives_have_a_table_each(tmp_path: Path) -> None:
    file = tmp_path / "hillinferd.toml"
    file.write_text(
        f'[[drive]]\nname = "fast"\npool = "{tmp_path}/a"\nprofile = "smartssd"\n'
        f'[[drive]]\npool = "{tmp_path}/b"\npool_capacity = "1GiB"\n'
    )
    fast, other = config.load(file, {}).drives
    assert (fast.name, fast.pool, fast.profile) == ("fast", tmp_path / "a", "smartssd")
    assert (other.name, other.pool_capacity, other.profile) == ("drive1", 1 << 30, "none")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("drive = 3", "[[drive]]"),
        ('pool = "/x"\n[[drive]]\n', "pool is not a key"),
        ('[[drive]]\nname = "a b"\n', "letters"),
        ('[[drive]]\npool = "/x"\nname = "a"\n[[drive]]\npool = "/y"\nname = "a"\n', "name of its own"),
        ('[[drive]]\npool = "/x"\n[[drive]]\n', "pool of its own"),
        ('[[drive]]\npool = "/x"\n[[drive]]\npool = "/x"\n', "pool of its own"),
        ('[[drive]]\ncard = "3b:00.1"\n', "0000:3b:00.1"),
    ],
)
def test_drive_tables_that_cannot_be(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "hillinferd.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(says)):
        config.load(file, {})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('pool_capacity = "many"', ["pool_capacity", "'many'", "64GiB"]),
        ('pool_capacity = "4KiB"', ["pool_capacity", "'4KiB'", "128KiB"]),
        ("pool_capacity = -5", ["pool_capacity", "-5"]),
        ("pool_capacity = true", ["pool_capacity", "True"]),
        ("pool_capacity = [1]", ["pool_capacity", "[1]"]),
        ("session_limit = 0", ["session_limit", "0", "at least 1"]),
        ('log_level = "loud"', ["log_level", "'loud'", "debug, info, warning, error"]),
        ("runtime_dir = 7", ["runtime_dir", "7", "a directory"]),
        ('pool_capasity = "1GiB"', ["pool_capasity is not a key", "use pool_capacity"]),
        ("pool_capacity = ", ["is not TOML"]),
    ],
)
def test_a_bad_value_names_key_value_and_what_is_allowed(tmp_path: Path, text: str, says: list[str]) -> None:
    file = tmp_path / "hillinferd.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(file, {})
    for part in says:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--pool-capacity", "x"), "pool_capacity: 'x' is not allowed"),
        (("--config", "/nowhere.toml"), "cannot read /nowhere.toml"),
        (("--runtime-dir", "/proc/hillinfer"), "runtime_dir: cannot make /proc/hillinfer"),
        (("--runtime-dir", "/tmp/" + "d" * 110), "Linux allows 107"),
    ],
)
def test_a_daemon_that_cannot_start_says_why_in_one_line(flags: tuple[str, ...], says: str) -> None:
    done = run("hillinferd", *flags)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("hillinferd: ")


def test_a_pool_that_cannot_be_opened_says_why_in_one_line(runtime_dir: Path) -> None:
    precious = runtime_dir / "thesis"
    precious.write_text("years of work")
    for path, says in ((precious, "not a cold pool"), (runtime_dir / "no" / "pool", "No such file")):
        done = run("hillinferd", "--runtime-dir", str(runtime_dir), "--pool", str(path))
        assert done.returncode == 1
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
    assert precious.read_text() == "years of work"


@pytest.mark.parametrize(
    ("command", "where"),
    [
        (("hillinferd", "--pool"), "pool"),
        (("hillinferd", "--pool"), "below/pool"),
        (("hillinferd", "--pool", "POOL", "--state-dir"), "below"),
        (("hillinferd.ctl", "fsck"), "pool"),
        (("hillinferd.ctl", "fsck", "POOL", "--repair", "--state-dir"), "below"),
        (("hillinferd.ctl", "format", "/dev/none", "--state-dir"), "below"),
    ],
)
def test_a_place_that_may_not_be_looked_at_is_one_line(
    foreign: tuple[Path, list[str]], runtime_dir: Path, command: tuple[str, ...], where: str
) -> None:
    place, prefix = foreign
    pool = runtime_dir / "pool"
    pool.write_bytes(b"content")
    line = [str(pool) if word == "POOL" else word for word in command]
    if command[0] == "hillinferd":
        line += [str(place / where), "--runtime-dir", str(runtime_dir)]
    else:
        line.append(str(place / where))
    done = run(*line, prefix=prefix)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{command[0].replace('hillinferd.ctl', 'hillinferctl')}: cannot look at ")
    assert f"{place / where}" in done.stderr
    assert "Permission denied" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_directory_that_may_not_be_looked_at_is_not_allowed(
    foreign: tuple[Path, list[str]], runtime_dir: Path
) -> None:
    place, prefix = foreign
    file = runtime_dir / "hillinferd.toml"
    file.write_text(f'configurations = "{place}/x"\n')
    done = run("hillinferd", "--config", str(file), "--check-config", prefix=prefix)
    assert done.returncode == 1
    assert "give a directory that exists" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("contexts", "delete", "book", "--uid", "-1"),
        ("contexts", "delete", "book", "--uid", str(2**32)),
        ("close", "--", "-1"),
        ("close", str(2**64)),
    ],
)
def test_numbers_that_no_message_has_room_for_are_refused(
    daemon: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HILLINFER_RUNTIME_DIR", str(daemon))
    done = run("hillinferd.ctl", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "than or equal to" in done.stderr


def test_help_names_every_option() -> None:
    text = run("hillinferd", "--help").stdout
    for name in ("runtime-dir", "pool", "pool-capacity", "evaluation-keys-dram", "log-level", "config"):
        assert f"--{name}" in text


def test_status_as_json_has_every_key_and_numbers(daemon: Path) -> None:
    with RawClient(daemon, 1 << 20) as client:
        done = run("hillinferd.ctl", "status", "--json", "--socket", str(daemon / "attach.sock"))
        assert done.returncode == 0
        status = json.loads(done.stdout)
        assert set(status) == {"version", "uptime_s", "device", "pool", "sessions", "drives", "draining"}
        assert status["device"]["driver"] == "host"
        assert status["pool"]["used_bytes"] == 0
        mine = [
            session for session in status["sessions"] if session["session_id"] == client.accepted.session_id
        ]
        assert mine[0]["arena_bytes"] == 1 << 20
        assert mine[0]["client_name"] == "raw"
        table = run("hillinferd.ctl", "status", "--socket", str(daemon / "attach.sock"))
        assert "cold pool" in table.stdout


def test_status_without_a_daemon_is_one_line(tmp_path: Path) -> None:
    done = run("hillinferd.ctl", "status", "--socket", str(tmp_path / "attach.sock"))
    assert done.returncode == 1
    assert "no daemon answers" in done.stderr
    assert done.stderr.count("\n") == 1


def test_health_and_reflection_need_no_token(daemon: Path) -> None:
    with grpc.insecure_channel(f"unix:{daemon}/grpc.sock") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "hillinfer.v1.ColdPool"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([request]), timeout=10
        )
        names = {service.name for service in next(answers).list_services_response.service}
        assert {"hillinfer.v1.ColdPool", "hillinfer.v1.Admin", "grpc.health.v1.Health"} <= names


def test_a_configuration_is_checked_without_a_daemon(tmp_path: Path) -> None:
    file = tmp_path / "hillinferd.toml"
    file.write_text("session_limit = 3\n")
    command = ("hillinferd", "--config", str(file), "--runtime-dir", str(tmp_path / "run"), "--check-config")
    good = run(*command)
    assert (good.returncode, good.stdout, good.stderr) == (0, "the configuration is accepted\n", "")
    file.write_text("session_limit = 0\n")
    bad = run(*command)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert "session_limit: 0 is not allowed" in bad.stderr
    assert not (tmp_path / "run").exists()
