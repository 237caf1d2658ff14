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

from hillinfer_core import packed
from hillinfer_core.layout import Reduction
from hillinfer_core.packed import Item, Unpacker, pack_request, with_tokens

from .messages import Done, Evaluate, Reply, Request, Traffic

MAX_PACKET = 192 * 1024
"""Largest packet in bytes: what a local socket takes with Linux's default buffer of 212,992, less slack."""

_IN_FILE = b"in file"

# First byte of a packet; a pickle begins with 0x80.
_EVALUATE, _EVALUATED = 1, 2

_REQUEST = struct.Struct("<BxxxxxxxQ")  # kind, session; a packed request
_ANSWER = struct.Struct("<BxxxxxxxQ6QQQ")  # kind, bytes of keys, traffic, winners, missing; packed results

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
        self._unpacker = Unpacker(_terms)

    def reply(self) -> Reply | None:
        """Return the next reply, None at hang-up; raises ``BlockingIOError`` if there is none yet."""
        packet, fd = self._receive()
        if fd is not None:
            with open(fd, "rb") as file:
                file.seek(0)
                packet = memoryview(file.read())
        return decoded(packet) if packet else None

    def request(self, packet: bytes) -> Request:
        """Return the request in ``packet``, which is not empty."""
        request: Request = self._evaluate(packet) if packet[0] == _EVALUATE else pickle.loads(packet)
        return request

    def _evaluate(self, packet: bytes) -> Evaluate:
        _, session_id = _REQUEST.unpack_from(packet)
        body = packet[_REQUEST.size :]
        layer, tokens, terms = self._unpacker.unpack(body)
        query_heads, reduction, items = terms
        return Evaluate(session_id, layer, query_heads, reduction, with_tokens(items, tokens), body)

    def _receive(self) -> tuple[memoryview, int | None]:
        nbytes, ancillary, _, _ = self._sock.recvmsg_into([self._buffer], _ONE_FD)
        fds = array("i", ancillary[0][2]) if ancillary else ()
        return memoryview(self._buffer)[:nbytes], fds[0] if fds else None


def decoded(packet: memoryview) -> Reply:
    """Return the reply in ``packet``, which is not empty and not in a file of its own."""
    reply: Reply = _decoded_answer(packet) if packet[0] == _EVALUATED else pickle.loads(packet)
    return reply


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
    body = ask.packed or pack_request(
        packed.Request(ask.layer, ask.query_heads, ask.reduction.to_proto(), 0, ask.evaluations)
    )
    return _REQUEST.pack(_EVALUATE, ask.session_id) + body


def _terms(request: packed.Request) -> tuple[int, Reduction, list[Item]]:
    return request.query_heads, Reduction.from_proto(request.reduction), request.items


def _encoded_answer(done: Done) -> bytes:
    moved = done.traffic
    header = _ANSWER.pack(
        _EVALUATED, done.key_bytes,
        moved.written, moved.read, moved.evaluated, moved.streamed, moved.reads, moved.writes,
        done.winners, done.missing,
    )  # fmt: skip
    return header + done.evaluated


def _decoded_answer(packet: memoryview) -> Done:
    _, key_bytes, *moved, winners, missing = _ANSWER.unpack_from(packet)
    return Done(Traffic(*moved), bytes(packet[_ANSWER.size :]), winners, missing, key_bytes=key_bytes)
