"""A copy of this machine with systemd as PID 1 and the package installed; what happens in it stays in it.

`python tests/systemd/systemd_machine.py` says in one line and by its status whether that is possible.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PYTHON = "/usr/lib/hillinfer/bin/python"
USERS = ("alice", "bob")
"""Two who may attach."""


def obstacle() -> str:
    """Why no machine can be booted here, empty if nothing is in the way."""
    if os.geteuid() != 0:
        return "needs root, for namespaces and mounts"
    for tool in ("/lib/systemd/systemd", "nsenter", "unshare", "dpkg"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    for hierarchy in ("systemd", "memory", "devices"):
        if not os.access(f"/sys/fs/cgroup/{hierarchy}/cgroup.procs", os.W_OK):
            return f"needs the version-1 cgroup hierarchy {hierarchy}, writable"
    tried = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"needs namespaces ({tried.stderr.strip()})" if tried.returncode else ""


class Machine:
    """A booted machine, reached through its namespaces."""

    def __init__(self, pid: int) -> None:
        self.root = Path(f"/proc/{pid}/root")
        self._enter = ["nsenter", f"--target={pid}", "--all", "--wd=/", "--", "env", "-i"]
        self._enter += ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "OMP_NUM_THREADS=1"]

    def command(self, *words: str, user: str = "") -> list[str]:
        who = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if user else []
        return [*self._enter, *who, *words]

    def run(self, *words: str, user: str = "", check: bool = True, timeout: float = 60) -> str:
        done = subprocess.run(
            self.command(*words, user=user), capture_output=True, text=True, timeout=timeout, check=False
        )
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def client(self, *words: str, user: str = "alice", check: bool = True) -> str:
        return self.run(PYTHON, "/opt/client.py", *words, user=user, check=check)

    def show(self, name: str, unit: str = "hillinferd.service") -> str:
        return self.run("systemctl", "show", "--property", name, "--value", unit).strip()

    @property
    def daemon(self) -> int:
        """The daemon's process id in the machine, 0 while there is none."""
        return int(self.show("MainPID"))

    @property
    def worker(self) -> int:
        """The worker's, 0 while there is none."""
        found = self.run("pgrep", "--full", "--newest", "hillinferd[.]worker", check=False)
        return int(found or 0)

    def signal(self, name: str, pid: int) -> None:
        # Zero and less would be a group of processes, our own among them.
        assert pid > 1
        self.run("kill", f"-{name}", str(pid))

    def journal(self, *match: str) -> str:
        return self.run("journalctl", "--no-pager", "--quiet", "--output=verbose", "-u", "hillinferd", *match)

    def configure(self, **keys: str) -> None:
        """Write the keys, values as TOML, before those of the package's own file."""
        text = (self.root / "etc/hillinfer/hillinferd.toml.package").read_text()
        lines = "".join(f"{name} = {value}\n" for name, value in keys.items())
        (self.root / "etc/hillinfer/hillinferd.toml").write_text(lines + text)


def wait_for(condition: Callable[[], object], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@contextmanager
def booted(package: Path) -> Iterator[Machine]:
    """Boot, install ``package``, and add the users and the clients' program."""
    directory = Path(tempfile.mkdtemp(prefix="hillinfer-systemd-", dir="/var/tmp"))
    name = f"hillinfer-test-{os.getpid()}"
    with (directory / "console").open("w") as console:
        boot = subprocess.Popen(
            [str(HERE / "boot"), str(directory), name],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )
    try:
        try:
            machine = _reached(boot)
        except AssertionError:
            raise AssertionError((directory / "console").read_text()) from None
        _furnish(machine, package)
        yield machine
    finally:
        # With unshare goes the first process of its namespace, and with that all others.
        boot.kill()
        boot.wait()
        _clear(directory, name)


def _reached(boot: subprocess.Popen[bytes]) -> Machine:
    children = Path(f"/proc/{boot.pid}/task/{boot.pid}/children")

    def started() -> bool:
        assert boot.poll() is None, "systemd did not start"
        found = children.read_text().split()
        return bool(found) and Path(f"/proc/{found[0]}/comm").read_text() == "systemd\n"

    wait_for(started)
    machine = Machine(int(children.read_text().split()[0]))
    wait_for(lambda: machine.run("systemctl", "is-active", "basic.target", check=False).strip() == "active")
    return machine


def _furnish(machine: Machine, package: Path) -> None:
    shutil.copy(package, machine.root / "opt/hillinfer.deb")
    shutil.copy(HERE / "client.py", machine.root / "opt/client.py")
    shutil.copy(HERE / "probe.py", machine.root / "opt/probe.py")
    (machine.root / "opt").chmod(0o755)
    machine.run("dpkg", "--install", "/opt/hillinfer.deb", timeout=300)
    for user in (*USERS, "mallory"):
        groups = ["--groups", "hillinfer"] if user in USERS else []
        machine.run("useradd", "--create-home", *groups, user)
    configuration = machine.root / "etc/hillinfer/hillinferd.toml"
    shutil.copy(configuration, configuration.with_suffix(".toml.package"))
    # A worker that hangs is given up soon.
    machine.configure(request_timeout="2")


def _clear(directory: Path, name: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    for hierarchy in Path("/sys/fs/cgroup").iterdir():
        ours = hierarchy / name
        if ours.is_dir():
            groups = sorted(ours.rglob("*/"), key=lambda path: -len(path.parts))
            for group in (*groups, ours):
                _remove_group(group)


def _remove_group(group: Path) -> None:
    for _ in range(50):
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return


if __name__ == "__main__":
    print(obstacle() or "systemd can be booted here")
    sys.exit(bool(obstacle()))
