"""`make test-vm`: boots a real kernel under emulation and runs the tests in guest/ there.

Arguments are pytest's, in the guest; without any, all tests of guest/ are run.
"""

from __future__ import annotations

import sys
import threading
import time

from image import REPOSITORY, Unavailable, build
from machine import Machine

LIMIT_SECONDS = 900
DEFAULT = ["tests/vm/guest"]


def main() -> int:
    """Run the tests; return pytest's exit status, or 1 if the guest had no chance to tell one."""
    folder = REPOSITORY / "build/vm"
    started = time.monotonic()
    try:
        image = build(folder, sys.argv[1:] or DEFAULT)
        built = time.monotonic()
        machine = Machine(image, folder)
    except Unavailable as missing:
        print(f"make test-vm: {missing}", file=sys.stderr)
        return 1
    alarm = threading.Timer(LIMIT_SECONDS, machine.kill)
    alarm.start()
    try:
        with (folder / "console.log").open("wb") as log:
            while line := machine.console.readline():
                log.write(line)
                log.flush()
                sys.stdout.write(line.decode(errors="replace"))
                sys.stdout.flush()
    finally:
        if alarm.is_alive() and machine.status is None:
            machine.kill()
        alarm.cancel()
        machine.close()
    print(f"image {built - started:.0f} s, guest {time.monotonic() - built:.0f} s")
    if machine.status is None:
        print(
            f"the guest did not finish within {LIMIT_SECONDS} s or died; see {folder}/console.log",
            file=sys.stderr,
        )
        return 1
    return machine.status


if __name__ == "__main__":
    sys.exit(main())
