"""The client's end of the ring: one question, one answer, each within its deadline."""

from __future__ import annotations

import itertools
import socket
import time
from contextlib import suppress
from typing import NamedTuple

from google.protobuf.message import Message

from hillinfer_core.arena import Arena
from hillinfer_core.errors import DaemonUnavailable, DeadlineExceeded, HillInferError, InvalidInput
from hillinfer_core.ring import (
    PAYLOAD_BYTES,
    RING_BYTES,
    Entry,
    Method,
    RingFds,
    Waited,
    client_ends,
)


class Submitted(NamedTuple):
    """A request on its way. deadline: as `time.monotonic` has it."""

    ticket: int
    method: Method
    timeout_s: float
    deadline: float


class RingTransport:
    """Asks through the ring `fds`, which are the transport's from now on, for the session of `connection`.

    Not thread-safe: the session's lock covers every call. There may be as many requests between `submit` and
    `answer` as the ring has entries; answers are waited for in any order.
    """

    def __init__(self, fds: RingFds, connection: socket.socket) -> None:
        self._fds = fds
        self._submissions, self._completions = client_ends(Arena(fds.memory, RING_BYTES, verify=True))
        self._tickets = itertools.count(1)
        self._early: dict[int, Entry] = {}  # answers that came before they were waited for
        # The daemon sends nothing more on it: an event is its end.
        self._connection = connection.fileno()

    def takes(self, request: Message) -> bool:
        """Whether `request` fits in an entry of the ring."""
        return request.ByteSize() <= PAYLOAD_BYTES

    def ask(self, method: Method, payload: bytes, timeout_s: float) -> Entry:
        """Sends the request in `payload` and waits for the answer; raises as `answer` does."""
        return self.answer(self.submit(method, payload, timeout_s))

    def submit(self, method: Method, payload: bytes, timeout_s: float) -> Submitted:
        """Sends the request in `payload`, which may take `timeout_s` seconds; does not block."""
        submitted = Submitted(next(self._tickets), method, timeout_s, time.monotonic() + timeout_s)
        timeout_ms = max(1, int(timeout_s * 1000))
        with suppress(BrokenPipeError):  # The end of the connection says it in `answer`.
            self._submissions.put(Entry(submitted.ticket, method, timeout_ms, payload), self._fds.submitted)
        return submitted

    def answer(self, submitted: Submitted) -> Entry:
        """Waits for the answer of a request, until its deadline at most.

        Raises `DeadlineExceeded` when there is none in time and `DaemonUnavailable`
        when there will be none.
        """
        while (entry := self._early.pop(submitted.ticket, None)) is None:
            found = self._wait(max(0.0, submitted.deadline - time.monotonic()))
            if isinstance(found, list):
                self._early.update((each.ticket, each) for each in found)
            elif found is not Waited.interrupted:
                raise _no_answer(submitted, found)
        return entry

    def close(self) -> None:
        """Closes the descriptors."""
        self._fds.close()

    def _wait(self, timeout_s: float) -> list[Entry] | Waited:
        try:
            return self._completions.wait(self._fds.completed, self._connection, timeout_s)
        except InvalidInput as error:
            raise DaemonUnavailable(
                f"the daemon broke the ring's rules ({error}); connect a new session"
            ) from None


def _no_answer(submitted: Submitted, why: Waited) -> HillInferError:
    name = submitted.method.name
    if why is Waited.hung_up:
        return DaemonUnavailable(
            f"{name}: the daemon ended the session; its contexts are gone, connect a new one"
        )
    return DeadlineExceeded(f"{name}: no answer within {submitted.timeout_s:g} s; see the daemon's log")
