"""Many clients to be killed, cheaply: one process that imports everything once and forks them.

Arguments: runtime directory, how many at once. For every line on standard input that many clients are forked,
their process ids are printed once all are at work, and the next line ends this batch's wait for their deaths.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
from raw_client import RawClient, random_rows

from hillinfer_core.layout import DType, Precision, Shape

SHAPE = Shape(1, 2, 64, DType.float16, Precision.int8)
ROWS = random_rows(np.random.default_rng(0), SHAPE, 256)


def work_until_killed(runtime_dir: Path, ready: int) -> None:
    """Append, evaluate and fetch without end, each answer checked."""
    client = RawClient(runtime_dir, 1 << 20)
    said = False
    while True:
        context = client.open(SHAPE)
        client.append(context, 0, 0, ROWS)
        query = np.ones((2, 64), np.float32)
        for _ in range(4):
            ids, _, rows, _ = client.evaluate(context, SHAPE, 0, query, 8, 0, 256, room=16)
            expected = np.concatenate([ROWS[head, ids[head]] for head in range(2)])
            assert np.array_equal(rows, expected), "wrong bytes"
            if not said:
                said = os.write(ready, b".") == 1
        client.close_context(context)


def main() -> None:
    runtime_dir, count = Path(sys.argv[1]), int(sys.argv[2])
    for _ in sys.stdin:
        reading, writing = os.pipe()
        pids = []
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                try:
                    work_until_killed(runtime_dir, writing)
                finally:
                    # Not to be taken for a death by SIGKILL.
                    os._exit(1)
            pids.append(pid)
        os.close(writing)
        for _ in pids:
            if os.read(reading, 1) != b".":
                break
        os.close(reading)
        print(*pids, flush=True)
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print("killed" if set(ends) == {-signal.SIGKILL} else f"ended with {ends}", flush=True)


if __name__ == "__main__":
    main()
