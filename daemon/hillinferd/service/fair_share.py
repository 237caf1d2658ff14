"""Start-time fair queueing: who is next, by the service each has had in proportion to its weight."""

from __future__ import annotations

from collections.abc import Iterable


class FairShare:
    """Virtual times of flows that compete for one server (Goyal, Vin, Cheng: SIGCOMM 1996).

    The next to be served is the one with the least start tag; of equal ones the first. While two flows
    both wait, the service they get, divided by their weights, differs by at most one piece of each. A flow
    that was away starts at the present virtual time: what it did not use is not kept for it. Pure
    arithmetic; service is charged when it has been measured, as one piece runs at a time.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._finish: dict[int, float] = {}

    def first(self, flows: Iterable[int]) -> int:
        """Return the one of the waiting ``flows``, at least one, to serve next, and begin to serve it."""
        chosen = min(flows, key=self._start)
        self._now = self._start(chosen)
        return chosen

    def charge(self, flow: int, weight: float, seconds: float) -> None:
        """Account ``seconds`` of service, which began with the last :meth:`first`, to its ``flow``."""
        self._finish[flow] = self._now + seconds / weight

    def reset(self) -> None:
        """Drop what is known of all flows."""
        self._now = 0.0
        self._finish.clear()

    def forget(self, flow: int) -> None:
        """Drop what is known of a flow; if it comes back, it does as a new one."""
        self._finish.pop(flow, None)

    def _start(self, flow: int) -> float:
        return max(self._now, self._finish.get(flow, 0.0))
