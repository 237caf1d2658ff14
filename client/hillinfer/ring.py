"""The client's end of the ring: one question, one answer, each within its deadline."""

from __future__ import annotations

import itertools
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from google.protobuf.message import Message

from hillinfer_core.arena import Arena
from hillinfer_core.errors import DaemonUnavailable, DeadlineExceeded, InvalidInput
from hillinfer_core.ring import (
    PAYLOAD_BYTES,
    RING_BYTES,
    Entry,
    Method,
    RingFds,
    clear_doorbell,
    client_ends,
    ring_doorbell,
)


class RingTransport:
    """Asks through the ring `fds`, which are the transport's from now on, for the session of `connection`.

    Not thread-safe: the session's lock covers `ask`.
    """

    def __init__(self, fds: RingFds, connection: socket.socket) -> None:
        self._fds = fds
        self._submissions, self._completions = client_ends(Arena(fds.memory, RING_BYTES, verify=True))
        self._tickets = itertools.count(1)
        self._poll = select.poll()
        self._poll.register(fds.completed, select.POLLIN)
        # The daemon sends nothing more on it: an event is its end.
        self._connection = connection.fileno()
        self._poll.register(self._connection, select.POLLIN)

    def takes(self, request: Message) -> bool:
        """Whether `request` fits in an entry of the ring."""
        return request.ByteSize() <= PAYLOAD_BYTES

    def ask(
        self, method: Method, payload: bytes, timeout_s: float, meanwhile: Callable[[], None] | None = None
    ) -> Entry:
        """Sends the request in `payload`, does what is to be done `meanwhile`, and waits for the answer.

        `timeout_s` seconds at most, and however long `meanwhile` takes, which must not raise.
        Raises `DeadlineExceeded` when there is none in time and `DaemonUnavailable`
        when there will be none. An answer that comes after these is dropped by the next `ask`.
        """
        ticket = next(self._tickets)
        deadline = time.monotonic() + timeout_s
        timeout_ms = max(1, int(timeout_s * 1000))
        self._submissions.put(Entry(ticket, method, timeout_ms, payload))
        with suppress(BrokenPipeError):  # The end of the connection says it below.
            ring_doorbell(self._fds.submitted)
        if meanwhile is not None:
            meanwhile()
        while True:
            left = deadline - time.monotonic()
            ready = self._poll.poll(max(0.0, left) * 1000)
            rung = any(fd == self._fds.completed for fd, _ in ready)
            if rung:
                rung = clear_doorbell(self._fds.completed)
                for entry in self._taken():
                    if entry.ticket == ticket:
                        return entry
            if ready and not rung:
                raise DaemonUnavailable(
                    f"{method.name}: the daemon ended the session; its contexts are gone, connect a new one"
                )
            if left <= 0:
                raise DeadlineExceeded(
                    f"{method.name}: no answer within {timeout_s:g} s; see the daemon's log"
                )

    def close(self) -> None:
        """Closes the descriptors."""
        self._fds.close()

    def _taken(self) -> list[Entry]:
        try:
            return self._completions.take()
        except InvalidInput as error:
            raise DaemonUnavailable(
                f"the daemon broke the ring's rules ({error}); connect a new session"
            ) from None
