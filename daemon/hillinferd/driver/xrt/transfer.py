"""From the drive into a buffer: straight into the card's memory where it is mapped, many reads at a time."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor, wait

from hillinfer_core.layout import PAGE

from ..contract import Bytes

STREAMS = 32
"""Reads in flight. Vendor's P2P test: 32 reach 3.13 to 3.21 GB/s, one 1.55 (256 KiB) to 2.36 (128 MiB)."""

LEAST_CHUNK, MOST_CHUNK = 128 << 10, 4 << 20
"""Bytes of a read. The drive takes at most 128 KiB a command (vendor); the upper bound is our choice."""


class Reader:
    """Reads ranges of the file ``fd`` into memory that ``preadv`` can reach.

    With ``direct`` the descriptor has O_DIRECT, and offset, length and address are multiples of 4096. Calls
    block; its threads sleep between calls.
    """

    def __init__(self, fd: int, direct: bool) -> None:
        self._fd = fd
        self._direct = direct
        self._threads = ThreadPoolExecutor(STREAMS, "hillinferd-p2p")

    def fill(self, view: Bytes, offset: int) -> None:
        """Fill ``view`` from ``offset``; raises ``OSError``, EIO where the file ends before that.

        No read is in flight when it returns, nor when it raises.
        """
        share = -(-len(view) // STREAMS)
        chunk = min(max(-(-share // LEAST_CHUNK) * LEAST_CHUNK, LEAST_CHUNK), MOST_CHUNK)
        if len(view) <= chunk:
            self._read(view, 0, len(view), offset)
            return
        reads = [
            self._threads.submit(self._read, view, start, min(start + chunk, len(view)), offset + start)
            for start in range(0, len(view), chunk)
        ]
        wait(reads)
        for read in reads:
            read.result()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _read(self, view: Bytes, start: int, end: int, offset: int) -> None:
        while start < end:
            with view[start:end] as part:
                done = os.preadv(self._fd, [part], offset)
            if self._direct:
                # A short direct read may end off a page: repeat the page that it tore.
                done -= done % PAGE
            if done == 0:
                raise OSError(errno.EIO, f"the pool ends before byte {offset + end - start}")
            start, offset = start + done, offset + done
