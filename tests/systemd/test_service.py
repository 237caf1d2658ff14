"""The installed service under a real systemd; the tests share one machine and leave the daemon serving."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from systemd_machine import PYTHON, Machine, wait_for

from hillinferd.journal import EVENTS

TYPED = {"ContextLost", "DaemonUnavailable", "DeviceUnavailable", "DeadlineExceeded"}


@contextmanager
def load(machine: Machine, user: str = "alice", *name: str) -> Iterator[list[dict[str, object]]]:
    """A client that works all the time; the list has what it saw once it is done."""
    command = machine.command(PYTHON, "/opt/client.py", "load", *name, user=user)
    seen: list[dict[str, object]] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        try:
            seen.append(json.loads(client.stdout.readline()))
            yield seen
        finally:
            client.stdin.close()
            seen += map(json.loads, client.stdout)
    assert client.returncode == 0, seen


def serves(machine: Machine) -> bool:
    return '"serving"' in machine.run("hillinferctl", "status", "--json", check=False)


def events(machine: Machine, event: str) -> int:
    return machine.journal(f"MESSAGE_ID={EVENTS[event]}").count("_PID=")


def test_the_first_client_starts_the_daemon(machine: Machine) -> None:
    assert (machine.show("ActiveState"), machine.daemon) == ("inactive", 0)
    assert machine.show("ActiveState", "hillinferd.socket") == "active"
    assert json.loads(machine.client("once")) == {"served": 1}
    assert machine.show("ActiveState") == "active"
    assert "1 of 1 drives serve" in machine.show("StatusText")
    entry = machine.journal(f"MESSAGE_ID={EVENTS['ready']}")
    assert f"HILLINFER_PID={machine.daemon}" in entry
    assert "SYSLOG_IDENTIFIER=hillinferd" in entry


def test_the_process_has_metrics_in_the_sandbox(machine: Machine) -> None:
    ask = (
        "import socket; asked = socket.socket(socket.AF_UNIX); asked.settimeout(20); "
        "asked.connect('/run/hillinfer/metrics.sock'); asked.sendall(b'GET /metrics HTTP/1.1\\r\\n\\r\\n'); "
        "print(asked.makefile().read())"
    )
    assert "hillinferd_process_resident_memory_bytes" in machine.run(PYTHON, "-c", ask)


def test_who_is_not_in_the_group_cannot_attach(machine: Machine) -> None:
    answer = json.loads(machine.client("once", user="mallory", check=False))
    assert answer["error"] == "DaemonUnavailable"
    assert "Permission denied" in answer["message"]


def test_units_are_understood_and_tight(machine: Machine) -> None:
    units = [f"/lib/systemd/system/hillinferd.{kind}" for kind in ("service", "socket")]
    # A key that it does not know is said, and no error.
    said = machine.run("systemd-analyze", "verify", "--man=no", *units)
    assert "hillinfer" not in said, said
    # Exposure of at most 2.0, in tenths.
    machine.run("systemd-analyze", "security", "--offline=true", "--threshold=20", units[0])


def probe(machine: Machine, sandboxed: bool) -> dict[str, str]:
    unit = (machine.root / "lib/systemd/system/hillinferd.service").read_text()
    lines = [
        line
        for line in unit.splitlines()
        if not line.startswith(
            ("ExecReload", "Requires=", "After=", "Type=", "WatchdogSec", "Restart=", "NotifyAccess")
        )
    ]
    report = machine.root / "var/lib/hillinfer/probe.json"
    report.unlink(missing_ok=True)
    run = f"{PYTHON} /opt/probe.py /var/lib/hillinfer/probe.json"
    if sandboxed:
        lines = [
            f"ExecStart={run}\nType=oneshot" if line.startswith("ExecStart=") else line for line in lines
        ]
    else:
        lines = ["[Service]", "Type=oneshot", "User=hillinfer", f"ExecStart={run}"]
    (machine.root / "run/systemd/system/probe.service").write_text("\n".join(lines) + "\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "probe.service")
    answer: dict[str, str] = json.loads(report.read_text())
    report.unlink()
    return answer


def test_the_sandbox_is_in_force(machine: Machine) -> None:
    # By their modes alone these would be open to the daemon's user.
    for path in ("usr/probe-here", "dev/loop7", "home/alice"):
        (machine.root / path).touch() if path.startswith("usr") else (machine.root / path).chmod(0o777)
    for path in ("usr", "etc/hillinfer"):
        (machine.root / path).chmod(0o777)
    (machine.root / "var/tmp/marker").write_text("seen")
    try:
        inside, outside = probe(machine, True), probe(machine, False)
    finally:
        for path in ("usr", "etc/hillinfer"):
            (machine.root / path).chmod(0o755)
    print(json.dumps({name: (outside[name], inside[name]) for name in inside}, indent=1))
    needed = [
        "state",
        "runtime directory",
        "memfd",
        "direct I/O",
        "asynchronous I/O",
        "Unix socket",
        "netlink",
        "child",
    ]
    assert {name: inside[name] for name in needed} == dict.fromkeys(needed, "allowed")
    refused = {
        "write to /usr": "EROFS",
        "write to /etc": "EROFS",
        "write to /var/tmp": "ENOENT",
        "home": "EACCES",
        "internet socket": "EAFNOSUPPORT",
        "raw packets": "EAFNOSUPPORT",
        "other device": "EPERM",
        "other processes": "ENOENT",
        "kernel settings": "ENOENT",
        "writable code": "EPERM",
        "user namespace": "EPERM",
        "real time": "EPERM",
        "processor affinity": "EPERM",
        "setuid file": "EPERM",
        "personality": "EPERM",
        "capabilities": "0000000000000000",
        "no new privileges": "1",
    }
    assert {name: inside[name] for name in refused} == refused
    # The same without the sandbox: it is the sandbox that refuses.
    assert [name for name in refused if outside[name] == inside[name]] == []


def test_reload_applies_what_it_can_and_says_what_needs_a_restart(machine: Machine) -> None:
    before, count = machine.daemon, events(machine, "configuration reloaded")
    machine.configure(session_limit="1", request_timeout="7")
    machine.run("systemctl", "reload", "hillinferd")
    wait_for(lambda: events(machine, "configuration reloaded") > count)
    said = machine.journal()
    assert "HILLINFER_APPLIED=session_limit" in said
    assert "HILLINFER_KEYS=request_timeout" in said
    with load(machine):
        assert json.loads(machine.client("once", check=False))["error"] == "QuotaExceeded"

    (machine.root / "etc/hillinfer/hillinferd.toml").write_text("session_limit = 0\n")
    refused = subprocess.run(
        machine.command("systemctl", "reload", "hillinferd"), capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1, refused
    assert "failed" in refused.stderr
    reason = "session_limit: 0 is not allowed"
    assert reason in machine.journal()
    assert reason in machine.run("systemctl", "status", "--no-pager", "hillinferd")
    assert machine.daemon == before
    assert events(machine, "configuration not reloaded") == 0
    with load(machine):
        assert json.loads(machine.client("once", check=False))["error"] == "QuotaExceeded"

    machine.configure(request_timeout="2")
    machine.run("systemctl", "reload", "hillinferd")
    wait_for(lambda: events(machine, "configuration reloaded") > count + 1)
    with load(machine):
        assert json.loads(machine.client("once")) == {"served": 1}
    machine.run("systemctl", "restart", "hillinferd")
    assert machine.daemon != before


def test_restart_and_stop_under_load(machine: Machine) -> None:
    with load(machine) as alice, load(machine, "bob") as bob:
        before = machine.daemon
        machine.run("systemctl", "restart", "hillinferd")
        assert machine.daemon not in (0, before)
        time.sleep(1)
        # Stopped, and started again by whoever attaches next.
        machine.run("systemctl", "stop", "hillinferd")
        wait_for(lambda: serves(machine))
        time.sleep(1)
    for seen in (alice, bob):
        assert {each["error"] for each in seen if "error" in each} <= TYPED
        assert sum("attached" in each for each in seen) == 3
    assert machine.show("Result") == "success"
    assert machine.show("NRestarts") == "0"


def test_a_reader_of_a_saved_context_goes_through_restarts(machine: Machine) -> None:
    machine.client("save", "read")
    with load(machine, "alice", "read") as seen:
        machine.run("systemctl", "restart", "hillinferd")
        time.sleep(1)
        machine.signal("KILL", machine.daemon)
        wait_for(lambda: serves(machine))
        time.sleep(1)
        machine.run("systemctl", "stop", "hillinferd")
        wait_for(lambda: serves(machine))
        time.sleep(1)
    # It attached once and met no error.
    assert [sorted(each) for each in seen] == [["attached"], ["restarts", "served"]]
    assert seen[-1]["restarts"] == 3


def test_a_group_reads_what_its_owner_lets_it(machine: Machine) -> None:
    machine.client("save", "shared", "hillinfer", user="alice")
    machine.client("save", "own", user="alice")
    assert json.loads(machine.client("check", "shared", "alice", user="bob")) == {"served": 1}
    for name in ("own", "none"):
        found = json.loads(machine.client("check", name, "alice", user="bob", check=False))
        assert found["error"] == "UnknownContext"
    refused = json.loads(machine.client("save", "given", "root", user="alice", check=False))
    assert refused["error"] == "NotAllowed"
    listed = machine.run("hillinferctl", "contexts", "--json", user="bob")
    assert [each["name"] for each in json.loads(listed)["contexts"]] == ["shared"]
    uid = machine.run("id", "-u", "alice").strip()
    deleted = machine.run(
        "hillinferctl", "contexts", "delete", "shared", "--uid", uid, user="bob", check=False
    )
    assert "may not delete" in deleted
    with load(machine, "alice"):
        everyone = json.loads(machine.run("hillinferctl", "sessions", "--json"))["sessions"]
        assert "alice" in {each["user"] for each in everyone}
        sessions = json.loads(machine.run("hillinferctl", "sessions", "--json", user="bob"))["sessions"]
        assert {each["user"] for each in sessions} <= {"bob"}


def test_a_hung_worker_is_replaced_and_the_daemon_stays(machine: Machine) -> None:
    before = machine.daemon
    with load(machine) as seen:
        hung = machine.worker
        machine.signal("STOP", hung)
        wait_for(lambda: machine.worker not in (0, hung) and serves(machine))
        wait_for(lambda: json.loads(machine.client("once", check=False)) == {"served": 1})
    assert "DeviceUnavailable" in {each.get("error") for each in seen}
    assert {each["error"] for each in seen if "error" in each} <= TYPED
    assert machine.daemon == before
    assert machine.show("NRestarts") == "0"


def test_a_hung_daemon_is_restarted_by_the_watchdog(machine: Machine) -> None:
    before, count = machine.daemon, int(machine.show("NRestarts"))
    with load(machine) as seen:
        since = time.monotonic()
        machine.signal("STOP", before)
        wait_for(lambda: machine.daemon not in (0, before), 60)
        wait_for(lambda: json.loads(machine.client("once", check=False)) == {"served": 1}, 60)
        print(f"back in service {time.monotonic() - since:.1f} s after SIGSTOP")
    assert int(machine.show("NRestarts")) == count + 1
    assert "Watchdog timeout" in machine.run("journalctl", "--no-pager", "-u", "hillinferd")
    errors = {each["error"] for each in seen if "error" in each}
    assert errors
    assert errors <= TYPED


def test_a_daemon_that_is_killed_comes_back(machine: Machine) -> None:
    before = machine.daemon
    machine.signal("KILL", before)
    assert json.loads(machine.client("once")) == {"served": 1}
    assert machine.daemon not in (0, before)


def test_a_worker_that_is_killed_for_memory_does_not_end_the_daemon(machine: Machine) -> None:
    assert machine.show("OOMPolicy") == "continue"


def test_upgrade_keeps_what_is_saved(machine: Machine) -> None:
    machine.client("save", "kept")
    before = machine.daemon
    machine.run("dpkg", "--force-confold", "--install", "/opt/hillinfer.deb", timeout=300)
    assert machine.daemon not in (0, before)
    assert json.loads(machine.client("check", "kept")) == {"served": 1}


def test_remove_keeps_state_and_purge_leaves_nothing(machine: Machine) -> None:
    machine.run("dpkg", "--remove", "hillinfer", timeout=300)
    assert not (machine.root / "usr/bin/hillinferd").exists()
    assert not (machine.root / "run/hillinfer").exists()
    assert (machine.root / "var/lib/hillinfer/pool").exists()
    assert (machine.root / "etc/hillinfer/hillinferd.toml").exists()
    assert "hillinfer" not in machine.run("pgrep", "-a", "-f", "/usr/lib/hillinfer", check=False)
    machine.run("dpkg", "--purge", "hillinfer", timeout=300)
    left = machine.run(
        "find", "/etc", "/usr/lib", "/usr/bin", "/var/lib", "/run", "-xdev", "-name", "*hillinfer*"
    )
    assert left == ""
    assert "hillinfer" not in machine.run("getent", "passwd")
    assert "hillinfer" not in (machine.root / "etc/group").read_text()
