"""Packets between daemon and device worker: one message in each.

An evaluation and its answer, which every layer of every token needs, are packed numbers; all else is pickled.
Both ends are the same installation and the socket is private to them, so pickle is safe here.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
from array import array

from hillinfer_core.layout import Reduction

from ..domain.regions import Region
from .messages import Done, Evaluate, Evaluated, Evaluation, Reply, Request, Traffic

MAX_PACKET = 192 * 1024
"""Largest packet in bytes: what a local socket takes with Linux's default buffer of 212,992, less slack."""

_IN_FILE = b"in file"

# First byte of a packet; a pickle begins with 0x80.
_EVALUATE, _EVALUATED = 1, 2

_REDUCTIONS = tuple(Reduction)

_REQUEST = struct.Struct("<BBHIIQ")  # kind, reduction, evaluations, layer, query heads, session
_EVALUATION = struct.Struct("<QIII14Q")  # as messages.Evaluation; of each region offset and length
_ANSWER = struct.Struct("<BxHxxxxQ6Q")  # kind, results, bytes of keys, traffic
_RESULT = struct.Struct(
    "<IIQQdI"
)  # generation, rows, evaluated, read, scan_s, KV heads; uint32 for each of them
_COUNT_BYTES = 4

_ONE_FD = socket.CMSG_SPACE(array("i").itemsize)


def encode(message: Request) -> bytes:
    """Return the packet for ``message``; raises ``ValueError`` above :data:`MAX_PACKET` bytes."""
    if isinstance(message, Evaluate):
        return _encoded_request(message)
    packet = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    if len(packet) > MAX_PACKET:
        raise ValueError(f"a message of {len(packet)} bytes exceeds {MAX_PACKET}")
    return packet


class Packets:
    """One end of the socket ``sock``, for receiving; holds the memory that packets come to."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray(MAX_PACKET)

    def reply(self) -> Reply | None:
        """Return the next reply, None at hang-up; raises ``BlockingIOError`` if there is none yet."""
        packet, fd = self._receive()
        if fd is not None:
            with open(fd, "rb") as file:
                file.seek(0)
                packet = memoryview(file.read())
        if not packet:
            return None
        reply: Reply = _decoded_answer(packet) if packet[0] == _EVALUATED else pickle.loads(packet)
        return reply

    def request(self) -> tuple[Request | None, int | None]:
        """Block for the next request and the descriptor that came with it; the request is None at hang-up."""
        packet, fd = self._receive()
        if not packet:
            return None, fd
        request: Request = _decoded_request(packet) if packet[0] == _EVALUATE else pickle.loads(packet)
        return request, fd

    def _receive(self) -> tuple[memoryview, int | None]:
        nbytes, ancillary, _, _ = self._sock.recvmsg_into([self._buffer], _ONE_FD)
        fds = array("i", ancillary[0][2]) if ancillary else ()
        return memoryview(self._buffer)[:nbytes], fds[0] if fds else None


def send_reply(sock: socket.socket, reply: Reply) -> None:
    """Send ``reply``; one that is too large for a packet in a file of its own."""
    if isinstance(reply, Done) and reply.evaluated:
        packet = _encoded_answer(reply)
    else:
        packet = pickle.dumps(reply, protocol=pickle.HIGHEST_PROTOCOL)
    if len(packet) <= MAX_PACKET:
        sock.send(packet)
        return
    fd = os.memfd_create("hillinfer-reply", os.MFD_CLOEXEC)
    try:
        with open(os.dup(fd), "wb") as file:
            file.write(packet)
        socket.send_fds(sock, [_IN_FILE], [fd])
    finally:
        os.close(fd)


def _encoded_request(ask: Evaluate) -> bytes:
    reduction, items = _REDUCTIONS.index(ask.reduction), ask.evaluations
    parts = [_REQUEST.pack(_EVALUATE, reduction, len(items), ask.layer, ask.query_heads, ask.session_id)]
    for context_id, first, end, k, query, ids, scores, held, rows, histogram, scales in items:
        parts.append(
            _EVALUATION.pack(
                context_id, first, end, k, *query, *ids, *scores, *held, *rows, *histogram, *scales
            )
        )
    return b"".join(parts)


def _decoded_request(packet: memoryview) -> Evaluate:
    _, reduction, _, layer, query_heads, session_id = _REQUEST.unpack_from(packet)
    items = [
        Evaluation(
            context_id, first, end, k,
            Region(n[0], n[1]), Region(n[2], n[3]), Region(n[4], n[5]), Region(n[6], n[7]),
            Region(n[8], n[9]), Region(n[10], n[11]), Region(n[12], n[13]),
        )
        for context_id, first, end, k, *n in _EVALUATION.iter_unpack(packet[_REQUEST.size :])
    ]  # fmt: skip
    return Evaluate(session_id, layer, query_heads, _REDUCTIONS[reduction], items)


def _encoded_answer(done: Done) -> bytes:
    moved = done.traffic
    parts = [
        _ANSWER.pack(
            _EVALUATED, len(done.evaluated), done.key_bytes,
            moved.written, moved.read, moved.evaluated, moved.streamed, moved.reads, moved.writes,
        )
    ]  # fmt: skip
    for generation, missing, brought, evaluated, read, scan_s in done.evaluated:
        parts.append(_RESULT.pack(generation, brought, evaluated, read, scan_s, len(missing)))
        parts.append(struct.pack(f"<{len(missing)}I", *missing))
    return b"".join(parts)


def _decoded_answer(packet: memoryview) -> Done:
    _, count, key_bytes, *moved = _ANSWER.unpack_from(packet)
    results, at = [], _ANSWER.size
    for _ in range(count):
        generation, brought, evaluated, read, scan_s, heads = _RESULT.unpack_from(packet, at)
        missing = struct.unpack_from(f"<{heads}I", packet, at + _RESULT.size)
        results.append(Evaluated(generation, list(missing), brought, evaluated, read, scan_s))
        at += _RESULT.size + heads * _COUNT_BYTES
    return Done(Traffic(*moved), results, key_bytes=key_bytes)
