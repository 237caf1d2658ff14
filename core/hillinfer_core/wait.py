"""Waiting to the microsecond, for what is made to last as long as on another device."""

from __future__ import annotations

import time
from collections.abc import Callable

SPIN_S = 60e-6
"""Waited for without sleeping: waking takes its time, and may be 50 us late besides (timer slack, prctl(2))
unless Linux was told otherwise, as the worker does."""


def wait_until(
    until: float,
    now: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return when the clock `now`, in seconds, shows `until`; at once if it already does. Blocks."""
    left = until - now()
    if left > SPIN_S:
        sleep(left - SPIN_S)
    while now() < until:
        pass
