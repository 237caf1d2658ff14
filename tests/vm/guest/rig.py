"""What tests do to the guest: its drives by serial number, device-mapper targets, pulling out a drive."""

from __future__ import annotations

import fcntl
import struct
import subprocess
import threading
import time
from pathlib import Path

import numpy as np

from hillinferd.driver.storage import aligned

MIB = 1 << 20
SECTOR = 512

_BLKGETSIZE64 = 0x80081272
_SLOT = threading.Lock()


def drive(name: str) -> Path:
    """Return the node of the emulated NVMe drive ``name``, as udev names it for us."""
    return Path(f"/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_hillinfer-{name}").resolve(strict=True)


def run(*command: str | Path) -> str:
    """Run a command; raises with what it printed if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def wipe(device: Path) -> None:
    """Make all of a drive read as zeros."""
    run("blkdiscard", "-f", device)


def sectors(device: Path) -> int:
    """Return the size of ``device`` in units of 512 bytes, as in device-mapper tables."""
    with device.open("rb") as file:
        return int(struct.unpack("Q", fcntl.ioctl(file, _BLKGETSIZE64, bytes(8)))[0]) // SECTOR


class Mapped:
    """A device-mapper device; its table may change while it is open."""

    def __init__(self, name: str, table: str) -> None:
        self._name = name
        self.path = Path("/dev/mapper", name)
        run("dmsetup", "create", name, "--table", table)
        run("udevadm", "settle")

    def load(self, table: str) -> None:
        """Put ``table`` in the place of the one there is; requests under way end with the old one."""
        run("dmsetup", "suspend", "--nolockfs", self._name)
        run("dmsetup", "load", self._name, "--table", table)
        run("dmsetup", "resume", self._name)

    def message(self, text: str) -> None:
        """Send the target a message."""
        run("dmsetup", "message", self._name, "0", text)

    def __enter__(self) -> Mapped:
        return self

    def __exit__(self, *_: object) -> None:
        run("udevadm", "settle")
        run("dmsetup", "remove", "--retry", self._name)


def linear(device: Path) -> str:
    """Return the table of a device that does nothing."""
    return f"0 {sectors(device)} linear {device} 0"


def flakey(device: Path, *features: str) -> str:
    """Return the table of dm-flakey, failing all the time: with EIO, or as ``features`` say."""
    words = " ".join(features).split()
    return " ".join(
        [f"0 {sectors(device)} flakey {device} 0 0 3600", *([str(len(words)), *words] if words else [])]
    )


def bad_range(device: Path, offset: int, length: int) -> str:
    """Return the table of a device with a range of bytes that cannot be read or written."""
    first, count, total = offset // SECTOR, length // SECTOR, sectors(device)
    end = first + count
    return f"0 {first} linear {device} 0\n{first} {count} error\n{end} {total - end} linear {device} {end}"


def slow(device: Path, *, read_ms: int, write_ms: int) -> str:
    """Return the table of a device whose requests wait that long."""
    return f"0 {sectors(device)} delay {device} 0 {read_ms} {device} 0 {write_ms}"


def pages(count: int, seed: int) -> np.ndarray:
    """Return random bytes, page-aligned, uint8 [count * 4096]."""
    data = aligned(count * 4096)
    data[:] = np.random.default_rng(seed).integers(0, 256, data.size, np.uint8)
    return data


def ask_host(request: str) -> None:
    """Have the emulator "plug" or "unplug" the drive "plug".

    Returns when the drive is out of the slot, or in it but perhaps not found yet.
    """
    with _SLOT, open("/dev/ttyS1", "r+b", buffering=0) as port:
        port.write(f"{request}\n".encode())
        answer = b""
        while not answer.endswith(b"\n"):
            answer += port.read(1) or b""
    assert answer == b"ok\n", answer


def wait_for(what: str, condition: object, seconds: float = 60) -> None:
    """Return once ``condition()`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.1)
