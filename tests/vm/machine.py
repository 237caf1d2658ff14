"""The emulated machine: QEMU without KVM, with fixed NVMe drives and one that comes and goes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from pathlib import Path

from image import DISK_SIGNATURE, Image, Unavailable

DRIVES = {"cold": 512, "wide": 4096, "log": 512, "replay": 512, "plug": 512}
"""Serial number (after "hillinfer-") and bytes a sector of each drive; "plug" is there while plugged in."""

_DRIVE_BYTES = 512 << 20
_KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet loglevel=1 panic=-1 mitigations=off rw rootwait init=/usr/sbin/guest-init "
    f"root=PARTUUID={DISK_SIGNATURE:08x}-01"
)


class Machine:
    """A running guest. What it writes to its console goes to ``console``; its requests are answered.

    The guest asks on its second serial port, a line each: "plug" and "unplug" (answered "ok", or "error" and
    why), "exit STATUS" (kept in :attr:`status`).
    """

    def __init__(self, image: Image, folder: Path) -> None:
        qemu = shutil.which("qemu-system-x86_64")
        if qemu is None:
            raise Unavailable("QEMU is needed: apt-get install --no-install-recommends qemu-system-x86")
        self.status: int | None = None
        # A Unix socket's path may be no longer than 107 bytes, which a repository's may be.
        self._sockets = tempfile.TemporaryDirectory(prefix="hillinfer-vm-")
        control, monitor = (Path(self._sockets.name, name) for name in ("control", "monitor"))
        # A /dev/kvm that is there need not work, inside another virtual machine.
        accelerator = "kvm" if os.environ.get("HILLINFER_KVM") else "tcg,thread=multi"
        self._process = subprocess.Popen(
            [qemu, "-accel", accelerator, "-machine", "q35", "-cpu", "max", "-smp", "2", "-m", "2G"]
            + ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-nic", "none"]
            + ["-serial", "stdio", "-serial", f"unix:{control},server=on,wait=off"]
            + ["-qmp", f"unix:{monitor},server=on,wait=off"]
            + ["-kernel", str(image.kernel), "-append", _KERNEL_ARGUMENTS]
            + _blockdev("root", image.disk, "unsafe")
            + ["-device", "nvme,serial=hillinfer-root,drive=root"]
            + ["-device", "pcie-root-port,id=bay,chassis=1"]
            + [argument for name, sector in DRIVES.items() for argument in _drive(folder, name, sector)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        self.console = self._process.stdout
        assert self.console is not None
        # QEMU has made its sockets once it writes to the console.
        if not self.console.readline():
            raise Unavailable(f"QEMU did not start: it ended with status {self._process.wait()}")
        self._monitor = _connect(monitor).makefile("rwb")
        self._monitor.readline()
        self._command("qmp_capabilities")
        self._control = _connect(control)
        threading.Thread(target=self._answer, daemon=True).start()

    def kill(self) -> None:
        """Stop the guest if it still runs."""
        self._process.kill()

    def close(self) -> None:
        """Wait until the guest is off, and clean up."""
        self._process.wait()
        self._control.close()
        self._sockets.cleanup()

    def _answer(self) -> None:
        with self._control.makefile("rwb") as lines:
            for line in lines:
                request = line.decode(errors="replace").split()
                if request[:1] == ["exit"]:
                    self.status = int(request[1])
                    continue
                try:
                    self._carry_out(request)
                    answer = "ok"
                except Exception as error:
                    answer = f"error {error}"
                lines.write(f"{answer}\n".encode())
                lines.flush()

    def _carry_out(self, request: list[str]) -> None:
        if request == ["plug"]:
            self._command(
                "device_add", driver="nvme", id="plugged", serial="hillinfer-plug", bus="bay", drive="plug"
            )
        elif request == ["unplug"]:
            # Until the guest has let go of it, the slot is not free for the next one.
            self._command("device_del", id="plugged", event="DEVICE_DELETED")
        else:
            raise ValueError(f"unknown request {request}")

    def _command(self, name: str, *, event: str = "", **arguments: str) -> None:
        """Have QEMU carry out a command of its QMP, and wait for ``event`` of its device, if named."""
        self._monitor.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        self._monitor.flush()
        waiting = {"return", event} - {""}
        while waiting:
            answer = json.loads(self._monitor.readline())
            if "error" in answer:
                raise RuntimeError(answer["error"]["desc"])
            if "return" in answer:
                waiting.discard("return")
            elif answer.get("data", {}).get("device") == arguments.get("id"):
                waiting.discard(answer["event"])


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def _drive(folder: Path, name: str, sector: int) -> list[str]:
    path = folder / f"{name}.img"
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(_DRIVE_BYTES)
    arguments = _blockdev(name, path, "writeback")
    if name == "plug":
        return arguments
    return [
        *arguments,
        *("-device", f"nvme,serial=hillinfer-{name},id={name}-drive"),
        *(
            "-device",
            f"nvme-ns,drive={name},bus={name}-drive,logical_block_size={sector},physical_block_size={sector}",
        ),
    ]


def _blockdev(name: str, path: Path, cache: str) -> list[str]:
    options = "cache.no-flush=on," if cache == "unsafe" else ""
    return [
        "-blockdev",
        f"driver=raw,node-name={name},{options}discard=unmap,file.driver=file,file.filename={path}",
    ]
