"""The daemon's books as a StatusResponse."""

from __future__ import annotations

from hillinfer_core.v1 import cold_pool_pb2 as pb

from ..domain.contexts import Context
from ..service.cold_pool import ColdPoolService
from ..service.sessions import Session


def status_response(service: ColdPoolService, version: str) -> pb.StatusResponse:
    """Return the state of this moment; blocks for nothing and changes nothing."""
    allocator = service.catalogue.allocator
    return pb.StatusResponse(
        version=version,
        uptime_s=service.uptime_s,
        device=_device(service),
        pool=pb.PoolStatus(
            capacity_bytes=allocator.capacity, used_bytes=allocator.used_bytes, extents=allocator.count
        ),
        sessions=[_session(service, session) for session in service.sessions],
    )


def _device(service: ColdPoolService) -> pb.DeviceStatus:
    worker, identity = service.worker, service.worker.identity
    return pb.DeviceStatus(
        driver=identity.driver if identity else "",
        path=identity.path if identity else "",
        direct_io=identity.direct_io if identity else False,
        worker_pid=worker.pid,
        worker_restarts=worker.restarts,
        written_bytes=worker.traffic.written,
        read_bytes=worker.traffic.read,
        evaluated_bytes=worker.traffic.evaluated,
        evaluation_key_bytes=service.catalogue.evaluation_key_bytes,
        evaluation_key_limit_bytes=service.catalogue.evaluation_key_limit,
    )


def _session(service: ColdPoolService, session: Session) -> pb.SessionStatus:
    return pb.SessionStatus(
        session_id=session.session_id,
        client_name=session.client_name,
        pid=session.peer.pid,
        uid=session.peer.uid,
        arena_bytes=session.arena.nbytes,
        contexts=[_context(context) for context in service.catalogue.of_session(session.session_id)],
    )


def _context(context: Context) -> pb.ContextStatus:
    shape = context.shape
    return pb.ContextStatus(
        context_id=context.context_id,
        tokens=context.layers[0].tokens,
        extent_bytes=sum(extent.length for extent in context.extents),
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=pb.DType.Name(shape.dtype.to_proto()),
        precision=pb.Precision.Name(shape.precision.to_proto()),
    )
