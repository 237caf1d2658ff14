"""The ColdPool service of cold_pool.proto: messages in, messages out, nothing decided here."""

# ruff: noqa: N802 (gRPC takes the method names from the .proto)

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import DType, Precision, Reduction, Shape
from hillinfer_core.packed import Evaluated
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinfer_core.v1 import cold_pool_pb2_grpc

from .. import __version__
from ..service import requests
from ..service.cold_pool import ColdPoolService
from ..service.sessions import Session
from .call import Context, deadline_of, session_of
from .status import durable_context, status_response


class ColdPoolServicer(cold_pool_pb2_grpc.ColdPoolServicer):
    """Finds the session by its token, and hands the work to the service with the call's deadline."""

    def __init__(self, service: ColdPoolService) -> None:
        self._service = service

    async def OpenContext(self, request: pb.OpenContextRequest, context: Context) -> pb.OpenContextResponse:
        """Open a context."""
        shape = Shape(
            request.layers,
            request.kv_heads,
            request.head_dim,
            DType.from_proto(request.dtype),
            Precision.from_proto(request.precision),
        )
        owner = request.base_uid if request.HasField("base_uid") else None
        ask = requests.OpenContext(
            shape, request.durable_name, request.base_name, dict(request.labels), owner
        )
        if request.WhichOneof("kind") and not (ask.durable_name or ask.base_name):
            raise InvalidInput("the name of a durable context is empty")
        opened = await self._service.open_context(self._session(context), ask, deadline_of(context))
        kept = opened.durable or opened.base
        return pb.OpenContextResponse(
            context_id=opened.context_id,
            append_unit=shape.append_unit,
            append_limit=opened.append_limit,
            layer_tokens=[layer.tokens for layer in opened.layers],
            tail_tokens=opened.tails,
            evaluation_key_bytes=opened.evaluation_key_bytes,
            checksum_bytes=opened.checksum_bytes,
            durable_id=kept.unique if kept else "",
            content_checksum=opened.base.checksum if opened.base else 0,
        )

    async def CloseContext(
        self, request: pb.CloseContextRequest, context: Context
    ) -> pb.CloseContextResponse:
        """Close a context."""
        await self._service.close_context(self._session(context), request.context_id, deadline_of(context))
        return pb.CloseContextResponse()

    async def Append(self, request: pb.AppendRequest, context: Context) -> pb.AppendResponse:
        """Append rows to a layer."""
        return await self.append(self._session(context), request, deadline_of(context))

    async def append(
        self, session: Session, request: pb.AppendRequest, deadline: float | None
    ) -> pb.AppendResponse:
        """Append rows to a layer, from whatever transport."""
        ask = requests.Append(
            request.context_id,
            request.layer,
            request.first_token,
            request.tokens,
            _region(request.rows),
            request.tail,
        )
        done = await self._service.append(session, ask, deadline)
        return pb.AppendResponse(
            layer_tokens=done.layer_tokens,
            evaluation_key_bytes=done.evaluation_key_bytes,
            checksum_bytes=done.checksum_bytes,
        )

    async def Evaluate(
        self, request_iterator: AsyncIterator[pb.EvaluateRequest], context: Context
    ) -> AsyncIterator[pb.EvaluateResponse]:
        """Answer evaluations in order, until the client ends the stream or one of them fails."""
        async for request in request_iterator:
            yield await self.evaluate(self._session(context), request, deadline_of(context))

    async def evaluate(
        self, session: Session, request: pb.EvaluateRequest, deadline: float | None
    ) -> pb.EvaluateResponse:
        """Answer one evaluation."""
        return evaluate_response(await self._service.evaluate(session, evaluate_ask(request), deadline))

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> pb.FetchResponse:
        """Bring rows by id or by range."""
        return await self.fetch(self._session(context), request, deadline_of(context))

    async def fetch(
        self, session: Session, request: pb.FetchRequest, deadline: float | None
    ) -> pb.FetchResponse:
        """Bring rows, from whatever transport."""
        ask: requests.FetchIds | requests.FetchRange | requests.FetchTail
        which = request.WhichOneof("which")
        if which == "by_ids":
            ask = requests.FetchIds(
                request.context_id,
                request.layer,
                list(request.by_ids.count_per_head),
                _region(request.by_ids.ids),
                _region(request.rows),
            )
        elif which == "range":
            ask = requests.FetchRange(
                request.context_id,
                request.layer,
                request.range.first_token,
                request.range.count,
                _region(request.rows),
            )
        elif which == "tail":
            ask = requests.FetchTail(request.context_id, request.layer, _region(request.rows))
        elif which == "keys":
            keys = requests.FetchKeys(
                request.context_id,
                request.layer,
                request.keys.first_token,
                request.keys.end_token,
                _region(request.rows),
                _region(request.keys.scales),
            )
            brought, read = await self._service.fetch_keys(session, keys, deadline)
            return pb.FetchResponse(
                read_bytes=read, generation=brought.generation, key_checksums=brought.checksums
            )
        else:
            raise InvalidInput("fetch needs by_ids, range, tail or keys")
        read = await self._service.fetch(session, ask, deadline)
        return pb.FetchResponse(read_bytes=read)

    async def SaveContext(self, request: pb.SaveContextRequest, context: Context) -> pb.SaveContextResponse:
        """Make a durable context complete and read-only."""
        gid = request.gid if request.HasField("gid") else None
        await self._service.save_context(
            self._session(context), request.context_id, gid, deadline_of(context)
        )
        return pb.SaveContextResponse()

    async def ListContexts(
        self, request: pb.ListContextsRequest, context: Context
    ) -> pb.ListContextsResponse:
        """List durable contexts; waits for nothing."""
        found = self._service.list_contexts(self._session(context))
        return pb.ListContextsResponse(contexts=[durable_context(*each) for each in found])

    async def DeleteContext(
        self, request: pb.DeleteContextRequest, context: Context
    ) -> pb.DeleteContextResponse:
        """Delete a durable context."""
        freed = await self._service.delete_context(
            self._session(context), request.uid, request.name, deadline_of(context)
        )
        return pb.DeleteContextResponse(freed_bytes=freed)

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        """Describe device, pool and sessions; waits for nothing."""
        return status_response(self._service, __version__, self._session(context))

    def _session(self, context: Context) -> Session:
        return session_of(self._service, context)


def evaluate_ask(request: pb.EvaluateRequest) -> requests.Evaluate:
    """Return what the service takes for ``request``, from whatever transport."""
    reduction = Reduction.from_proto(request.reduction)
    items = [_evaluation(item) for item in request.evaluations]
    tokens = [(item.first_token, item.end_token) for item in request.evaluations]
    return requests.Evaluate(request.layer, tokens, requests.Terms(request.query_heads, reduction, items))


def evaluate_response(results: list[Evaluated]) -> pb.EvaluateResponse:
    """Return the message for what the service answered."""
    return pb.EvaluateResponse(
        results=[
            pb.EvaluationResult(
                generation=result.generation,
                missing_per_head=result.missing_per_head,
                rows_brought=result.rows_brought,
                evaluated_bytes=result.evaluated_bytes,
                read_bytes=result.read_bytes,
                scan_s=result.scan_s,
            )
            for result in results
        ],
        # A client whose cores are busy sees the answer late; this is when it was there.
        answered_at=time.monotonic(),
    )


def _region(region: pb.Region) -> requests.RawRegion:
    return requests.RawRegion(region.offset, region.length, region.generation)


def _evaluation(item: pb.Evaluation) -> requests.Evaluation:
    return requests.Evaluation(
        context_id=item.context_id,
        k=item.k,
        query=_region(item.query),
        ids=_region(item.ids),
        scores=_region(item.scores),
        held=_region(item.held),
        rows=_region(item.rows),
        histogram=_region(item.histogram),
        scales=_region(item.scales),
    )
