"""Brings the two sockets up and down in the right order."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from hillinfer_core.protocol import attach_socket, grpc_socket
from hillinfer_core.v1 import admin_pb2, admin_pb2_grpc, cold_pool_pb2, cold_pool_pb2_grpc

from ..logs import get_logger
from ..service.cold_pool import ColdPoolService
from ..service.drain import Drain
from ..service.supervisor import Supervisor
from .admin import AdminServicer
from .attach import REQUEST_TIMEOUT_S, AttachServer
from .interceptor import ErrorInterceptor
from .servicer import ColdPoolServicer

log = get_logger(__name__)

STOP_GRACE_S = 0.5
"""How long calls in flight may go on after a stop was asked for; streams never end by themselves."""

DRAIN_S = 5.0
"""How long requests in flight may go on after a stop was asked for; new ones are refused. Our choice."""

END_S = 10.0
"""How long the sessions may take to end after that; all of it is within the unit's TimeoutStopSec. Ours."""

_OPTIONS = (
    # A connection that does not begin to speak HTTP/2 is dropped as soon as one that does not attach.
    ("grpc.server_handshake_timeout_ms", int(REQUEST_TIMEOUT_S * 1000)),
    # Some 20 KB each. More are refused at once, which costs those nothing who are connected. Our choice.
    ("grpc.max_allowed_incoming_connections", 8192),
    # Of a connection. Calls beyond that wait in the client; a session may have 256 requests. Our choice.
    ("grpc.max_concurrent_streams", 1024),
)

_SERVICES = (
    cold_pool_pb2.DESCRIPTOR.services_by_name["ColdPool"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name,
)
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Transports:
    """The attach socket and the gRPC server in ``runtime_dir``, which the caller has locked.

    ``listening`` is the attach socket if it is there already and is to outlive this process.
    """

    def __init__(
        self, service: ColdPoolService, runtime_dir: Path, listening: socket.socket | None = None
    ) -> None:
        self._sessions = service.sessions
        self._drain = service.sessions.drain
        self._drives = service.drives
        self._followers: list[asyncio.Task[None]] = []
        self._attach_path = attach_socket(runtime_dir)
        self._grpc_path = grpc_socket(runtime_dir)
        self._ours = [self._grpc_path] if listening else [self._attach_path, self._grpc_path]
        # The lock is ours: what lies there was left by a daemon that was killed.
        self._unlink()
        address = f"unix:{self._grpc_path}"
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor(service.count_refused)], options=_OPTIONS
        )
        self._health = health.aio.HealthServicer()
        servicer = ColdPoolServicer(service)
        cold_pool_pb2_grpc.add_ColdPoolServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]
        admin_pb2_grpc.add_AdminServicer_to_server(AdminServicer(service), self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        with _owner_and_group_only():
            self._server.add_insecure_port(address)
            self._attach = AttachServer(service, servicer, self._attach_path, address, listening)

    async def start(self) -> None:
        """Begin to serve: gRPC first, as a client is sent there by the attach socket."""
        await self._server.start()
        await self._set_health()
        self._followers = [asyncio.create_task(self._follow(drive.worker)) for drive in self._drives]
        self._followers.append(asyncio.create_task(self._follow(self._drain)))
        self._attach.start()

    async def stop(self) -> None:
        """Say NOT_SERVING, refuse what is new, let requests in flight finish, end calls and sessions."""
        for follower in self._followers:
            follower.cancel()
        await self._health.enter_graceful_shutdown()
        await self._attach.close()
        if not await self._sessions.finish(DRAIN_S):
            log.warning("requests in flight were given up", after_s=DRAIN_S)
        await self._server.stop(STOP_GRACE_S)
        # Sessions end after what runs of them, and a worker that hangs would take all of a request's time.
        ending = asyncio.create_task(self._attach.stop())
        await asyncio.wait({ending}, timeout=END_S)
        if not ending.done():
            for drive in self._drives:
                if drive.queue.busy:
                    log.warning("a worker that is not done is given up", drive=drive.name, after_s=END_S)
                    drive.worker.take_away("the daemon is stopping")
        await ending
        self._unlink()

    async def _follow(self, what: Supervisor | Drain) -> None:
        async for _ in what.changes():
            await self._set_health()

    async def _set_health(self) -> None:
        up = not self._drain.on and any(drive.worker.up for drive in self._drives)
        for name in ("", *_SERVICES):
            await self._health.set(name, _SERVING if up else _NOT_SERVING)

    def _unlink(self) -> None:
        for path in self._ours:
            path.unlink(missing_ok=True)


@contextmanager
def _owner_and_group_only() -> Iterator[None]:
    # A socket's mode decides who may connect; bind takes it from the umask.
    before = os.umask(0o117)
    try:
        yield
    finally:
        os.umask(before)
