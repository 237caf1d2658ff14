"""Checks of what every machine needs, with a card or without."""

from __future__ import annotations

import errno
import json
import mmap
import os
import resource
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from hillinfer_core import kernel
from hillinfer_core.layout import PAGE
from hillinfer_core.units import format_bytes

from .model import Finding, Machine, failed, not_applicable, ok, warning

IMPORT_TIMEOUT_S = 20.0
"""Longest that importing pyxrt may take before it counts as hung. Our choice."""

_UDEVD = Path("/run/udev/control")
"""Socket of a running systemd-udevd."""

_CAP_IPC_LOCK = 14
"""Number of the capability that lifts the limit (capabilities(7), linux/capability.h)."""


def discovery(machine: Machine) -> Finding:
    """pyudev and libudev are there, and udevd runs, without which nothing that is plugged in is noticed."""
    if machine.inventory is None:
        return failed(machine.trouble, "install what is missing; the host driver on a file works without")
    found = f"NVMe namespaces: {len(machine.inventory.namespaces)}, SmartSSDs: {len(machine.cards)}"
    if not _UDEVD.exists():
        return warning(
            f"{found}; udevd does not run: what comes and goes is not noticed", "start systemd-udevd"
        )
    return ok(found)


def xrt(machine: Machine) -> Finding:
    """pyxrt can be imported: it comes with XRT, not from PyPI. In a process of its own, as it may hang."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", "import pyxrt; print(pyxrt.__file__)"],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_S,
            check=False,
        )
        trouble = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        good = done.returncode == 0
    except subprocess.TimeoutExpired:
        good, trouble = False, f"importing it took more than {IMPORT_TIMEOUT_S:.0f} s"
    if good:
        return ok(f"{done.stdout.strip()}, XRT {_xrt_version() or 'of unknown version'}")
    if not machine.cards:
        return not_applicable(f"no SmartSSD, so pyxrt is not needed ({trouble})")
    return failed(
        f"pyxrt cannot be imported: {trouble}",
        "install XRT, source its setup.sh, and use the Python version that its pyxrt was built for",
    )


def _xrt_version() -> str:
    # XRT installs version.json beside its libraries; XILINX_XRT is set by its setup.sh.
    file = Path(os.environ.get("XILINX_XRT", "/opt/xilinx/xrt")) / "version.json"
    try:
        return str(json.loads(file.read_text())["BUILD_VERSION"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def direct_io(machine: Machine) -> Finding:
    """A page can be read with O_DIRECT where the pool is; without, reads go through the page cache."""
    place = _place(machine.pool)
    try:
        if place.is_dir():
            with tempfile.NamedTemporaryFile(dir=place, prefix=".hillinfer-doctor-") as scratch:
                os.ftruncate(scratch.fileno(), PAGE)
                _read_direct(scratch.name)
        else:
            _read_direct(place)
    except OSError as error:
        if machine.daemons_pool and isinstance(error, PermissionError):
            return _daemons(place)
        if error.errno != errno.EINVAL:
            return failed(f"{place}: {error.strerror}", "name a place that you may write to with --pool")
        return warning(
            f"{place}: no direct I/O; rows go through the page cache, which takes memory",
            "put the pool on ext4, xfs or a block device",
        )
    return ok(f"{place} takes direct I/O")


def _read_direct(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, PAGE) as page:
            os.preadv(descriptor, [page], 0)
    finally:
        os.close(descriptor)


def free_space(machine: Machine) -> Finding:
    """There is room for the smallest pool that the daemon takes, the header and one extent."""
    place = _place(machine.pool)
    if _is_block(place):
        try:
            with place.open("rb") as device:
                size = device.seek(0, os.SEEK_END)
        except OSError as error:
            if machine.daemons_pool and isinstance(error, PermissionError):
                return _daemons(place)
            return failed(f"{place}: {error.strerror}", "see the permissions of the device")
        found = f"{place} has {format_bytes(size)}"
    else:
        free = os.statvfs(place)
        size = free.f_bavail * free.f_frsize
        if place == machine.pool and os.path.isfile(place):
            # The daemon starts a file anew, so what it takes now comes back.
            size += place.stat().st_blocks * 512
        found = f"{place} has room for {format_bytes(size)}"
    if size < machine.smallest_pool:
        return failed(
            f"{found}; the smallest pool takes {format_bytes(machine.smallest_pool)}",
            "free some space, or name another place with --pool",
        )
    return ok(found)


def memory_lock(machine: Machine) -> Finding:
    """The limit of locked memory covers an arena, as registering its pages with the kernel would need."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or limit >= machine.arena:
        shown = "none" if limit == resource.RLIM_INFINITY else format_bytes(limit)
        return ok(f"limit {shown}, largest arena {format_bytes(machine.arena)}")
    if _may_lock():
        return ok(f"limit {format_bytes(limit)}, but this process is exempt (CAP_IPC_LOCK)")
    return warning(
        f"limit {format_bytes(limit)}, largest arena {format_bytes(machine.arena)}",
        "raise LimitMEMLOCK= in the unit, or memlock in /etc/security/limits.conf and log in again",
    )


def _may_lock() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


def processor(_: Machine) -> Finding:
    """The processor has vector instructions that the kernel for ranking has code for."""
    kinds = kernel.variants()
    if len(kinds) > 1:
        return ok(f"keys are ranked with {kinds[-1]}")
    return warning(
        f"only {kinds[-1]} code runs here: right, but slower", "an x86-64 processor with AVX2 ranks faster"
    )


def _place(pool: Path) -> Path:
    """Return the pool, or the first directory above it that is there."""
    # Unlike Path.exists, this takes what may not be looked at for absent.
    while not os.path.exists(pool) and pool != pool.parent:
        pool = pool.parent
    return pool


def _daemons(place: Path) -> Finding:
    return not_applicable(f"{place} is the daemon's, which uses it; this user may not look")


def _is_block(path: Path) -> bool:
    return stat.S_ISBLK(path.stat().st_mode)
