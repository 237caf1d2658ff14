"""What crosses the two sockets: the attach handshake, arena regions, errors."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from hillinfer_core import errors, protocol
from hillinfer_core.arena import Arena
from hillinfer_core.attach_socket import connect
from hillinfer_core.layout import PAGE, DType, Precision, Reduction
from hillinfer_core.ring import RingFds
from hillinfer_core.v1 import attach_pb2, cold_pool_pb2

# One cache line, one 512-bit load.
ALIGNMENT = 64

_REPLY_BUFFER = protocol.MAX_PACKET

_DESCRIPTORS = 4  # the arena's, and the ring's three


def attach(
    path: Path, arena_bytes: int, name: str, timeout_s: float, ring: bool = True
) -> tuple[socket.socket, attach_pb2.Accepted, Arena | None, RingFds | None]:
    """Attaches to the daemon whose attach socket is `path`.

    Returns the connection (closing it ends the session), the daemon's answer,
    the mapped arena and the ring's descriptors, which are the caller's to close
    (both None when `arena_bytes` is 0, the latter without `ring` too). Blocks for
    at most `timeout_s` seconds.

    Raises `DaemonUnavailable` when nothing listens at `path`, `DeadlineExceeded`
    when the daemon does not answer, else the error with which it refused.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        accepted, descriptors = _handshake(connection, path, arena_bytes, name, timeout_s, ring)
        keep = 0
        try:
            if len(descriptors) != ((_DESCRIPTORS if ring else 1) if arena_bytes else 0):
                raise errors.DaemonUnavailable(
                    f"the daemon at {path} sent no arena or no ring; is it of this version?"
                )
            arena = Arena(descriptors[0], accepted.arena_bytes, verify=True) if descriptors else None
            fds = RingFds(*descriptors[1:]) if descriptors[1:] else None
            keep = len(descriptors[1:])
        finally:
            for descriptor in descriptors[: len(descriptors) - keep]:
                os.close(descriptor)
    except TimeoutError:
        connection.close()
        raise errors.DeadlineExceeded(
            f"the daemon at {path} did not answer within {timeout_s:g} s; see its log, or raise timeout_s"
        ) from None
    except OSError as error:
        connection.close()
        raise errors.DaemonUnavailable(
            f"no daemon answers at {path} ({error.strerror or error}); "
            "start hillinferd, or name another socket"
        ) from None
    except BaseException:
        connection.close()
        raise
    return connection, accepted, arena, fds


def _handshake(
    connection: socket.socket, path: Path, arena_bytes: int, name: str, timeout_s: float, ring: bool
) -> tuple[attach_pb2.Accepted, list[int]]:
    request = attach_pb2.AttachRequest(
        protocol_version=protocol.PROTOCOL_VERSION,
        layout_version=protocol.LAYOUT_VERSION,
        client_name=name,
        arena_bytes=arena_bytes,
        ring=ring and arena_bytes > 0,
    )
    connect(connection, path, timeout_s)
    connection.sendall(request.SerializeToString())
    packet, descriptors, _, _ = socket.recv_fds(
        connection, _REPLY_BUFFER, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
    )
    reply = attach_pb2.AttachReply.FromString(packet)
    outcome = reply.WhichOneof("outcome")
    if outcome == "accepted":
        return reply.accepted, list(descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    if outcome == "refused":
        raise errors.by_name(reply.refused.error)(reply.refused.message)
    raise errors.DaemonUnavailable(f"the daemon at {path} hung up during the attach; see its log")


def typed_error(error: grpc.RpcError, doing: str) -> errors.HillInferError:
    """The error of hillinfer_core.errors that a failed call stands for; `doing` names the call."""
    if not isinstance(error, grpc.Call):
        return errors.HillInferError(f"{doing}: {error}")
    details = error.details() or ""
    if name := _error_name(error):
        return errors.by_name(name)(details)
    code = error.code()
    # Cancelled by the daemon, that is, which stops: this process looks at no call that it cancelled itself.
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return errors.DaemonUnavailable(
            f"{doing}: the daemon went away ({details}); its contexts are gone, connect a new session"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded(f"{doing}: no answer within the deadline; see the daemon's log")
    return errors.HillInferError(f"{doing}: {code.name}: {details}")


def answered(error: grpc.RpcError) -> bool:
    """Whether the daemon itself ended the call with this error: it is done with the call's regions."""
    return isinstance(error, grpc.Call) and bool(_error_name(error))


def _error_name(call: grpc.Call) -> str:
    for key, value in call.trailing_metadata() or ():
        if key == protocol.ERROR_KEY:
            return value if isinstance(value, str) else value.decode()
    return ""


def number(member: DType | Precision | Reduction) -> Any:
    """The member's number for a message; Any, as the stubs type enums by classes that nothing can make."""
    return member.to_proto()


class ArenaTooSmall(errors.InvalidInput):
    """A call needs more arena than the session has."""


class Staging:
    """Hands out regions of the arena, or of a part of it, one after another; `reset` takes all of them back.

    Not thread-safe: the session's lock covers a call from its `reset` to the
    last look at what the daemon wrote.
    """

    def __init__(self, arena: Arena, generation: int, first: int = 0, end: int | None = None) -> None:
        self._arena = arena
        self.generation = generation
        self._first, self._end = first, arena.nbytes if end is None else end
        self._used = first

    @property
    def nbytes(self) -> int:
        """Bytes of the arena, or of the part."""
        return self._end - self._first

    @property
    def free(self) -> int:
        """Bytes left from the next page boundary on."""
        return max(0, self._end - _round_up(self._used, PAGE))

    def divided(self) -> tuple[Staging, Staging, Staging]:
        """Two halves of most of it, and an eighth, or as much less as makes whole pages."""
        rest = self._end - self.nbytes // 8 // PAGE * PAGE
        middle = min(self._first + _round_up((rest - self._first) // 2, PAGE), rest)
        ends = (self._first, middle), (middle, rest), (rest, self._end)
        one, two, three = (Staging(self._arena, self.generation, *each) for each in ends)
        return one, two, three

    def reset(self) -> None:
        """Takes back every region."""
        self._used = self._first

    def take(
        self, shape: Sequence[int], dtype: Any, alignment: int = ALIGNMENT
    ) -> tuple[cold_pool_pb2.Region, np.ndarray[Any, Any]]:
        """A region for an array, and the array on it; the contents are whatever was there.

        Raises `ArenaTooSmall` when the arena has no room for it.
        """
        length = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if length == 0:
            return cold_pool_pb2.Region(), np.empty(shape, dtype)
        offset = _round_up(self._used, alignment)
        if offset + length > self._end:
            raise ArenaTooSmall(
                f"the session's arena of {self.nbytes} bytes is too small for this call: "
                f"connect with arena_bytes of {offset + length - self._first} or more"
            )
        self._used = offset + length
        region = cold_pool_pb2.Region(offset=offset, length=length, generation=self.generation)
        return region, self._arena.view(offset, tuple(shape), dtype)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
