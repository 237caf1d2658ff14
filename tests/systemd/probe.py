"""Tries what the daemon must and must not be able to do; prints a JSON object of how each went.

Under the unit's sandbox, and outside it as a control. "allowed", or the name of the error.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
STATE = Path("/var/lib/hillinfer")


def system_call(name: str, *arguments: object) -> None:
    if getattr(LIBC, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def write(path: str) -> Callable[[], None]:
    def attempt() -> None:
        file = Path(path) / "probe"
        file.write_text("")
        file.unlink()

    return attempt


def direct_io() -> None:
    file = STATE / "probe"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        page = mmap.mmap(-1, 4096)
        os.pwrite(descriptor, page, 0)
        os.preadv(descriptor, [page], 0)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
        file.unlink()


def asynchronous_io() -> None:
    context = ctypes.c_ulong(0)
    if LIBC.syscall(206, 1, ctypes.byref(context)) < 0:  # io_setup
        raise OSError(ctypes.get_errno(), "io_setup")
    # io_submit of nothing: refused by the filter or fine.
    if LIBC.syscall(209, context, 0, None) < 0:
        raise OSError(ctypes.get_errno(), "io_submit")
    LIBC.syscall(207, context)  # io_destroy


def other_processes() -> None:
    Path("/proc/1/status").read_text()


def setuid_file() -> None:
    file = STATE / "probe"
    file.write_text("")
    try:
        file.chmod(0o4755)
    finally:
        file.unlink()


def open_socket(family: int, kind: int = socket.SOCK_DGRAM) -> Callable[[], None]:
    return lambda: socket.socket(family, kind).close()


ATTEMPTS: dict[str, Callable[[], object]] = {
    # What the daemon does.
    "state": write(str(STATE)),
    "runtime directory": write("/run/hillinfer"),
    "memfd": lambda: os.close(os.memfd_create("probe", os.MFD_ALLOW_SEALING)),
    "direct I/O": direct_io,
    "asynchronous I/O": asynchronous_io,
    "Unix socket": open_socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),
    "netlink": open_socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "child": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
    # What it does not.
    "write to /usr": write("/usr"),
    "write to /etc": write("/etc/hillinfer"),
    "write to /var/tmp": lambda: Path("/var/tmp/marker").read_text(),
    "home": lambda: os.listdir("/home/alice"),
    "internet socket": open_socket(socket.AF_INET),
    "raw packets": open_socket(socket.AF_PACKET, socket.SOCK_RAW),
    "other device": lambda: os.close(os.open("/dev/loop7", os.O_RDONLY)),
    "other processes": other_processes,
    "kernel settings": lambda: Path("/proc/sys/kernel/ostype").read_text(),
    "writable code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
    "user namespace": lambda: system_call("unshare", 0x10000000),
    "real time": lambda: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)),
    "processor affinity": lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)),
    "setuid file": setuid_file,
    "personality": lambda: system_call("personality", 0x0008),
}


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "allowed"


if __name__ == "__main__":
    report: dict[str, str] = {name: outcome(attempt) for name, attempt in ATTEMPTS.items()}
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
    )
    report["capabilities"] = status["CapBnd"]
    report["no new privileges"] = status["NoNewPrivs"]
    Path(sys.argv[1]).write_text(json.dumps(report))
