"""The Admin service of admin.proto: messages in, messages out, nothing decided here."""

# ruff: noqa: N802 (gRPC takes the method names from the .proto)

from __future__ import annotations

from hillinfer_core.v1 import admin_pb2 as pb
from hillinfer_core.v1 import admin_pb2_grpc

from ..cec.messages import to_message
from ..service.administration import CardState
from ..service.cold_pool import ColdPoolService
from .call import Context, deadline_of, session_of


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """Finds the session by its token, and hands the work to the service with the call's deadline."""

    def __init__(self, service: ColdPoolService) -> None:
        self._service = service
        self._administration = service.administration

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Refuse new sessions and contexts, or take them in again."""
        left = self._administration.drain(session_of(self._service, context), request.on)
        drives = self._service.drives
        contexts = [drive.catalogue.of_session(each.session_id) for drive in drives for each in left]
        return pb.DrainResponse(
            on=request.on,
            sessions=len(left),
            contexts=sum(map(len, contexts)),
            requests=sum(each.requests for each in left),
        )

    async def CloseSession(
        self, request: pb.CloseSessionRequest, context: Context
    ) -> pb.CloseSessionResponse:
        """End a session of somebody."""
        ending = self._administration.close_session(session_of(self._service, context), request.session_id)
        return pb.CloseSessionResponse(
            client_name=ending.client_name, pid=ending.peer.pid, uid=ending.peer.uid
        )

    async def CecStatus(self, request: pb.CecStatusRequest, context: Context) -> pb.CecStatusResponse:
        """Describe the bitstreams of cards."""
        session, deadline = session_of(self._service, context), deadline_of(context)
        states = await self._administration.status(session, request.drive, deadline)
        return pb.CecStatusResponse(cards=[_card(state) for state in states])

    async def CecLoad(self, request: pb.CecLoadRequest, context: Context) -> pb.CecLoadResponse:
        """Load a bitstream and prove it."""
        session, deadline = session_of(self._service, context), deadline_of(context)
        state = await self._administration.load(session, request.drive, request.name, deadline)
        return pb.CecLoadResponse(card=_card(state))

    async def CecRollback(self, request: pb.CecRollbackRequest, context: Context) -> pb.CecRollbackResponse:
        """Go back to the bitstream before."""
        session, deadline = session_of(self._service, context), deadline_of(context)
        state = await self._administration.rollback(session, request.drive, deadline)
        return pb.CecRollbackResponse(card=_card(state))


def _card(state: CardState) -> pb.CecCard:
    return to_message(state.drive.name, state.drive.card, state.status, state.contexts)
