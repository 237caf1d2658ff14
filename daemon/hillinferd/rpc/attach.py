"""The attach socket: identity, token and arena for a session, and its end when the client hangs up."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from hillinfer_core.errors import HillInferError, InvalidInput, VersionMismatch, name_of
from hillinfer_core.protocol import LAYOUT_VERSION, MAX_PACKET, PROTOCOL_VERSION
from hillinfer_core.v1 import attach_pb2 as pb

from .. import __version__
from ..logs import get_logger
from ..service.cold_pool import ColdPoolService
from ..service.sessions import Peer, Session
from .ring import RingServer
from .servicer import ColdPoolServicer

log = get_logger(__name__)

REQUEST_TIMEOUT_S = 5.0
"""How long a connection may stay silent before it is dropped; a client writes at once. Our choice."""

SILENT_LIMIT = 64
"""Connections that may be silent at a time; one more ends the oldest of whoever has the most. Our choice."""

_BACKLOG = 1024

_UCRED = struct.Struct("iII")  # struct ucred in socket(7): pid, uid, gid


class AttachServer:
    """Serves the attach socket at ``path``, which must not be in use. One event loop.

    ``listening`` is a socket that listens there already and that somebody else holds too: it is taken as it
    is, and who connects while nobody accepts waits there.
    """

    def __init__(
        self,
        service: ColdPoolService,
        servicer: ColdPoolServicer,
        path: Path,
        grpc_address: str,
        listening: socket.socket | None = None,
    ) -> None:
        self._service = service
        self._servicer = servicer
        self._grpc_address = grpc_address
        self._connections: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._silent: dict[asyncio.Task[None], int] = {}  # by user, the oldest first
        self._sock = listening or _listen(path)

    def start(self) -> None:
        """Begin to accept."""
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Stop accepting; sessions go on."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        self._sock.close()

    async def stop(self) -> None:
        """Stop accepting, end every session and wait until all are freed."""
        await self.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._sock)
                peer = _peer(connection)
            except OSError as error:
                log.warning("cannot accept a client", error=error)
                await asyncio.sleep(0.1)
                continue
            # Each is a descriptor: silent ones must neither use up all there are nor keep others out.
            if len(self._silent) >= SILENT_LIMIT:
                self._drop_silent()
            task = asyncio.create_task(self._serve(connection, peer))
            self._silent[task] = peer.uid
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
            # While many wait, accepting would otherwise give nobody else a turn.
            await asyncio.sleep(0)

    def _drop_silent(self) -> None:
        ((most, _),) = Counter(self._silent.values()).most_common(1)
        oldest = next(task for task, uid in self._silent.items() if uid == most)
        del self._silent[oldest]
        oldest.cancel()

    async def _serve(self, connection: socket.socket, peer: Peer) -> None:
        loop = asyncio.get_running_loop()
        session = None
        with connection:
            try:
                try:
                    # Not wait_for: before Python 3.12 it loses a cancellation that comes with the packet.
                    async with asyncio.timeout(REQUEST_TIMEOUT_S):
                        packet = await loop.sock_recv(connection, MAX_PACKET)
                finally:
                    if task := asyncio.current_task():
                        self._silent.pop(task, None)
                if not packet:
                    return
                session = await self._attach(connection, peer, packet)
                if session:
                    await self._until_hang_up(connection, session)
            except (OSError, TimeoutError) as error:
                log.debug("attach connection ended", error=repr(error))
            except Exception:
                log.exception("unexpected error on an attach connection")
            finally:
                if session:
                    await self._service.detach(session)

    async def _until_hang_up(self, connection: socket.socket, session: Session) -> None:
        """Serve the session's ring until the client hangs up, breaks a protocol, or is to go."""
        ring = RingServer(self._service, self._servicer, session, session.ring) if session.ring else None
        hang_up = asyncio.create_task(asyncio.get_running_loop().sock_recv(connection, 1))
        closing = asyncio.create_task(session.closing.wait())
        waiting: list[asyncio.Task[Any]] = [hang_up, closing]
        if ring:
            ring.start()
            waiting.append(asyncio.create_task(ring.broken.wait()))
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            # Nothing more is ever sent: this ends when the client hangs up.
            if hang_up.done() and hang_up.result():
                log.warning("client sent more than its request", session=session.session_id)
        finally:
            if ring:
                ring.stop()
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _attach(self, connection: socket.socket, peer: Peer, packet: bytes) -> Session | None:
        try:
            request = _parse(packet)
            session = await self._service.attach(request.client_name, request.arena_bytes, peer, request.ring)
        except HillInferError as error:
            self._service.count_refused(name_of(error))
            log.info("attach refused", pid=peer.pid, uid=peer.uid, reason=error)
            refused = pb.Refused(error=name_of(error), message=str(error))
            connection.send(pb.AttachReply(refused=refused).SerializeToString())
            return None
        accepted = pb.Accepted(
            session_id=session.session_id,
            token=session.token,
            grpc_address=self._grpc_address,
            arena_bytes=session.arena.nbytes,
            arena_generation=session.arena.generation,
            server_version=__version__,
            instance=self._service.instance,
        )
        log.info(
            "session attached",
            session=session.session_id,
            client=session.client_name,
            pid=peer.pid,
            uid=peer.uid,
            arena_bytes=session.arena.nbytes,
        )
        fds = [session.arena_fd] if session.arena_fd is not None else []
        if (ring := session.clients_ring) is not None:
            fds += [ring.memory, ring.submitted, ring.completed]
        try:
            socket.send_fds(connection, [pb.AttachReply(accepted=accepted).SerializeToString()], fds)
        except OSError:
            log.debug("client left while attaching", session=session.session_id)
        session.close_clients_ring()
        return session


def _listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        sock.bind(str(path))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _parse(packet: bytes) -> pb.AttachRequest:
    try:
        request = pb.AttachRequest.FromString(packet)
    except DecodeError:
        raise InvalidInput("the packet is not an AttachRequest") from None
    theirs = (request.protocol_version, request.layout_version)
    if theirs != (PROTOCOL_VERSION, LAYOUT_VERSION):
        raise VersionMismatch(
            f"the client speaks protocol {theirs[0]} and layout {theirs[1]}, "
            f"this daemon {PROTOCOL_VERSION} and {LAYOUT_VERSION}; install the same hillinfer on both sides"
        )
    return request


def _peer(connection: socket.socket) -> Peer:
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(data)
    return Peer(pid, uid)
