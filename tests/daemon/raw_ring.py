"""A session's ring without the client library."""

from __future__ import annotations

import os
import select
from pathlib import Path

from raw_client import CALL_S, attach_raw, attach_request

from hillinfer_core.arena import Arena
from hillinfer_core.ring import RING_BYTES, Entry, Outcome, RingFds, clear_doorbell, client_ends
from hillinfer_core.v1 import attach_pb2


class RawRing:
    """A session's ring, used by hand."""

    def __init__(self, runtime_dir: Path) -> None:
        self.connection, reply, fds = attach_raw(runtime_dir, attach_request(1 << 20, ring=True))
        assert reply.WhichOneof("outcome") == "accepted"
        self.accepted = reply.accepted
        arena, *ring = fds
        os.close(arena)
        self.fds = RingFds(*ring)
        self.memory = Arena(self.fds.memory, RING_BYTES, verify=True)
        self.submissions, self.completions = client_ends(self.memory)

    def completed(self, count: int) -> list[Entry]:
        found: list[Entry] = []
        while len(found) < count:
            assert select.select([self.fds.completed], [], [], CALL_S)[0], "no completion came"
            clear_doorbell(self.fds.completed)
            found += self.completions.take()
        return found

    def refusal(self, entry: Entry) -> attach_pb2.Refused:
        assert entry.code == Outcome.refused
        return attach_pb2.Refused.FromString(entry.payload)

    def hung_up(self) -> bool:
        self.connection.settimeout(CALL_S)
        return self.connection.recv(1) == b""

    def close(self) -> None:
        self.connection.close()
        self.fds.close()
