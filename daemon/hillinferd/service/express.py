"""The express: evaluations that repeat go from a ring to the worker and back in native code.

It is the selector of the daemon's event loop. While that sleeps and nobody has anything under way or waiting,
it carries what a :class:`Permit` covers itself, also several of one session, one after another. Anything else
makes the loop go on as ever, with all that happened meanwhile told before anything else runs: accounts, and
an evaluation that is under way, which goes on as a piece of the work queue. So the queue decides whenever
there is anything to decide.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from hillinfer_core._native import Express as Native
from hillinfer_core.ring import Consumer, Entry, Producer, RingFds

from ..logs import get_logger
from ..worker.messages import Traffic

log = get_logger(__name__)

_EPOLLIN, _EPOLLOUT = 0x001, 0x004  # sys/epoll.h


class Permit(NamedTuple):
    """That a session may repeat ``asked``, of layers that have ``held`` tokens, on the drive ``drive``.

    ``worker`` is the descriptor of its worker's socket. It holds until :meth:`Express.revoke`.
    """

    asked: bytes
    held: list[int]
    drive: int
    worker: int


class Run(NamedTuple):
    """Evaluations of one session on one drive, one after another: ``seconds`` that each took on the device.

    It ``waited`` as many for those that the same session had asked before. ``key_bytes`` are those in fast
    memory after the last.
    """

    waited: list[float]
    seconds: list[float]
    traffic: Traffic
    winners: int
    missing: int
    key_bytes: int


class Flight(NamedTuple):
    """An evaluation that was sent to the worker of ``drive``, at ``began`` of ``time.monotonic``.

    ``answer`` is a packet of the worker's that is not what a plain evaluation gets, empty for none yet.
    """

    drive: int
    began: float
    entry: Entry
    answer: bytes


class Rider(Protocol):
    """A ring that evaluations come from."""

    def note(self, drive: int, run: Run) -> None:
        """Account what was carried."""

    def go_on(self, flight: Flight) -> None:
        """Take over what is under way."""

    def expect(self, since: list[float]) -> None:
        """Be told that the doorbell was rung for as many entries as ``since`` says, at these times."""

    def leave(self) -> None:
        """End: the client does not listen any more."""


class Express(selectors.EpollSelector):
    """The selector of one event loop, :meth:`new_loop`; ``idle`` says whether nothing is going on or waits.

    All methods belong to the loop's thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.idle: Callable[[], bool] = lambda: False
        self.term = 1
        """Of permits: another after each :meth:`revoke`."""
        self._native = Native()
        self._riders: dict[int, Rider] = {}

    def new_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop that it is the selector of."""
        return asyncio.SelectorEventLoop(self)

    def add(
        self, session_id: int, submissions: Consumer, completions: Producer, fds: RingFds, rider: Rider
    ) -> None:
        """Take evaluations of a session's ring, once there are permits, until :meth:`remove`."""
        self._native.add(session_id, submissions.native, completions.native, fds.submitted, fds.completed)
        self._riders[fds.submitted] = rider

    def remove(self, fds: RingFds) -> None:
        """Take nothing more of a ring."""
        self._native.remove(fds.submitted)
        self._riders.pop(fds.submitted, None)

    def permit(self, fds: RingFds, permit: Permit) -> None:
        """Carry what ``permit`` covers."""
        self._native.permit(fds.submitted, *permit)

    def revoke(self) -> None:
        """Drop all permits: something has changed that one may depend on."""
        self.term += 1
        self._native.revoke()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for events; see ``selectors.BaseSelector``."""
        if not self._native.permitted or (timeout is not None and timeout <= 0) or not self.idle():
            return super().select(timeout)
        events = self._native.wait(self.fileno(), -1.0 if timeout is None else timeout)
        self._tell(events)
        keys = self.get_map()
        ready = []
        for fd, event in events:
            key = keys.get(fd)
            if key is not None:
                # As EpollSelector has it: an error is for whoever waits, whatever for.
                reads = selectors.EVENT_READ if event & ~_EPOLLOUT else 0
                writes = selectors.EVENT_WRITE if event & ~_EPOLLIN else 0
                ready.append((key, (reads | writes) & key.events))
        return ready

    def _tell(self, events: list[tuple[int, int]]) -> None:
        # All of it first: what a rider is told may end it.
        runs, flight = self._native.take_runs(), self._native.take_flight()
        waiting, left = self._native.take_waiting(), self._native.take_left()
        riders = self._riders
        for submitted, drive, waited, seconds, traffic, *counts in runs:
            if submitted in riders:
                run = Run(waited, seconds, Traffic(*traffic), *counts)
                _guarded(partial(riders[submitted].note, drive, run))
        if flight is not None:
            submitted, drive, began, *entry, answer = flight
            if submitted in riders:
                flown = Flight(drive, began, Entry._make(entry), answer)
                _guarded(partial(riders[submitted].go_on, flown))
        if waiting is not None:
            submitted, since = waiting
            events.append((submitted, _EPOLLIN))
            if submitted in riders:
                _guarded(partial(riders[submitted].expect, since))
        for submitted in left:
            if submitted in riders:
                _guarded(riders[submitted].leave)


def _guarded(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception:
        # As the loop does with what its callbacks raise: what leaves a selector would end the loop.
        log.exception("the express could not tell what it did")
