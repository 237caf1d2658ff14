"""The daemon's books as a StatusResponse."""

from __future__ import annotations

import time

from hillinfer_core.v1 import cold_pool_pb2 as pb

from ..domain.contexts import Context
from ..domain.durable import Durable
from ..service.cold_pool import ColdPoolService
from ..service.drive import Drive
from ..service.sessions import Session
from ..service.usage import Usage


def status_response(service: ColdPoolService, version: str, asking: Session) -> pb.StatusResponse:
    """Return the state of this moment, with the sessions that ``asking`` may see; changes nothing."""
    drives = [_drive(drive) for drive in service.drives]
    return pb.StatusResponse(
        version=version,
        uptime_s=service.uptime_s,
        device=drives[0].device,
        pool=pb.PoolStatus(
            capacity_bytes=sum(drive.pool.capacity_bytes for drive in drives),
            used_bytes=sum(drive.pool.used_bytes for drive in drives),
            extents=sum(drive.pool.extents for drive in drives),
        ),
        sessions=[_session(service, session) for session in service.sessions.seen_by(asking)],
        drives=drives,
        draining=service.sessions.drain.on,
    )


def durable_context(drive: Drive, durable: Durable) -> pb.DurableContext:
    """Return what a user may know of a durable context."""
    shape = durable.shape
    return pb.DurableContext(
        name=durable.name,
        uid=durable.uid,
        saved=durable.saved,
        tokens=durable.layers[0].tokens + durable.tails[0],
        extent_bytes=durable.extent_bytes,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=pb.DType.Name(shape.dtype.to_proto()),
        precision=pb.Precision.Name(shape.precision.to_proto()),
        labels=durable.labels,
        created_unix_s=durable.created_unix_s,
        users=len(durable.readers) + bool(durable.writer),
        drive=drive.name,
        gid=durable.gid,
    )


def _drive(drive: Drive) -> pb.DriveStatus:
    worker, identity, allocator = drive.worker, drive.worker.identity, drive.catalogue.allocator
    asked = drive.settings.driver
    durables = drive.catalogue.durables
    return pb.DriveStatus(
        name=drive.name,
        state=worker.state,
        reason=worker.reason,
        device=pb.DeviceStatus(
            driver=identity.driver if identity else asked.kind,
            path=identity.path if identity else asked.path,
            direct_io=identity.direct_io if identity else False,
            worker_pid=worker.pid,
            worker_restarts=worker.restarts,
            written_bytes=drive.usage.traffic.written,
            read_bytes=drive.usage.traffic.read,
            evaluated_bytes=drive.usage.traffic.evaluated,
            evaluation_key_bytes=drive.key_bytes,
            evaluation_key_limit_bytes=identity.key_memory if identity else 0,
            profile=identity.profile if identity else "",
            streamed_bytes=drive.usage.traffic.streamed,
        ),
        pool=pb.PoolStatus(
            capacity_bytes=allocator.capacity, used_bytes=allocator.used_bytes, extents=allocator.count
        ),
        durable_contexts=len(durables),
        durable_bytes=sum(durable.extent_bytes for durable in durables),
        usage=_usage(drive.usage),
        waiting=drive.queue.waiting,
    )


def _session(service: ColdPoolService, session: Session) -> pb.SessionStatus:
    contexts = (drive.catalogue.of_session(session.session_id) for drive in service.drives)
    return pb.SessionStatus(
        session_id=session.session_id,
        client_name=session.client_name,
        pid=session.peer.pid,
        uid=session.peer.uid,
        arena_bytes=session.arena.nbytes,
        contexts=[_context(context) for each in contexts for context in each],
        age_s=time.monotonic() - session.since,
        weight=session.weight,
        requests=session.requests,
        usage=_usage(session.usage),
    )


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        pieces=usage.pieces,
        queue_s=usage.queue_s,
        device_s=usage.device_s,
        written_bytes=usage.traffic.written,
        read_bytes=usage.traffic.read,
        evaluated_bytes=usage.traffic.evaluated,
        winners=usage.winners,
        missing=usage.missing,
    )


def _context(context: Context) -> pb.ContextStatus:
    shape = context.shape
    return pb.ContextStatus(
        context_id=context.context_id,
        tokens=context.layers[0].tokens,
        extent_bytes=context.extent_bytes,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=pb.DType.Name(shape.dtype.to_proto()),
        precision=pb.Precision.Name(shape.precision.to_proto()),
    )
