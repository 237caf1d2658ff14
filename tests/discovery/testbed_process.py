"""Runs ``watch`` over a mocked machine; started by ``umockdev-wrapper``, which libumockdev must be loaded by.

Reads one JSON command a line, named as the methods of ``Testbed``: ``{"uevent": [path, action]}``; paths
begin below /sys. Writes one JSON event a line: ``["appeared" or "disappeared", name, usable]``.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import sys
import threading
from pathlib import Path

from hillinferd.discovery import watch as watching
from hillinferd.discovery.inventory import scan
from hillinferd.discovery.model import Inventory, Namespace

looking = threading.Lock()
"""Nobody looks at the machine while it is half changed."""


def look() -> Inventory:
    with looking:
        return scan()


class Testbed:
    def __init__(self) -> None:
        library = ctypes.CDLL("libumockdev.so.0")
        library.umockdev_testbed_new.restype = ctypes.c_void_p
        self._library = library
        library.umockdev_testbed_get_root_dir.restype = ctypes.c_char_p
        self._bed = ctypes.c_void_p(library.umockdev_testbed_new())
        self._root = library.umockdev_testbed_get_root_dir(self._bed).decode()

    def add(self, description: str) -> None:
        assert self._library.umockdev_testbed_add_from_string(self._bed, description.encode(), None)

    def uevent(self, path: str, action: str) -> None:
        self._library.umockdev_testbed_uevent(self._bed, f"/sys{path}".encode(), action.encode())

    def set(self, path: str, attribute: str, value: str) -> None:
        self._library.umockdev_testbed_set_attribute(
            self._bed, f"/sys{path}".encode(), attribute.encode(), value.encode()
        )

    def link(self, path: str, name: str, target: str) -> None:
        os.symlink(target, f"{self._root}/sys{path}/{name}")

    def unlink(self, path: str, name: str) -> None:
        os.unlink(f"{self._root}/sys{path}/{name}")

    def remove(self, path: str) -> None:
        # umockdev has no event for what is gone, the kernel only for that.
        self.uevent(path, "remove")
        self._library.umockdev_testbed_remove_device(self._bed, f"/sys{path}".encode())
        # umockdev 0.17 forgets this link, and refuses to make it again.
        Path(f"{self._root}/sys/block", os.path.basename(path)).unlink(missing_ok=True)

    def close(self) -> None:
        """Delete the mocked machine's files."""
        self._library.g_object_unref(self._bed)


def obey(bed: Testbed, line: str) -> None:
    for command, arguments in json.loads(line).items():
        with looking:
            getattr(bed, command)(*([arguments] if isinstance(arguments, str) else arguments))


def obey_all(bed: Testbed) -> None:
    for line in sys.stdin:
        obey(bed, line)
    with looking:
        bed.close()
        os._exit(0)


async def report(ready_within_s: float) -> None:
    async for event in watching.watch(ready_within_s=ready_within_s):
        device = event.device
        name = device.node if isinstance(device, Namespace) else device.fpga.address
        print(json.dumps([type(event).__name__.lower(), name, device.usable]), flush=True)


def main() -> None:
    watching.scan = look
    bed = Testbed()
    obey(bed, sys.stdin.readline())
    threading.Thread(target=obey_all, args=(bed,), daemon=True).start()
    asyncio.run(report(float(sys.argv[1])))


if __name__ == "__main__":
    main()
