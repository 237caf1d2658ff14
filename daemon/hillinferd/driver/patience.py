"""Waiting for a pool that its last user is about to let go of."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 3.0
"""How long a worker whose daemon was killed may take to end; it is killed with it. Our choice."""


def while_busy(claim: Callable[[], T]) -> T:
    """Call ``claim`` until it succeeds, for 3 s at most; then raise its ``OSError`` (EBUSY or EAGAIN)."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return claim()
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EAGAIN) or time.monotonic() > deadline:
                raise
        time.sleep(0.02)
