"""Maps typed errors to gRPC status codes and the error's name in trailing metadata."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from hillinfer_core.errors import HillInferError, InvalidInput, name_of
from hillinfer_core.protocol import ERROR_KEY

from ..logs import get_logger

log = get_logger(__name__)

_LONGEST_MESSAGE = 2048
"""Bytes. gRPC sends it as metadata, up to three times as long, and may drop the call above 8 KiB of them."""

Context = grpc.aio.ServicerContext[Any, Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of every service, gRPC's own health and reflection too.

    ``refused`` is called with the name of each error that is answered with.
    """

    def __init__(self, refused: Callable[[str], None]) -> None:
        self._refused = refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler with its errors mapped."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                _stream(handler.stream_stream, self._refused),
                _decoder(handler.request_deserializer),
                handler.response_serializer,
            )
        if handler.response_streaming:
            # Health's Watch, which writes its answers itself.
            return grpc.unary_stream_rpc_method_handler(
                _unary(handler.unary_stream, self._refused),
                _decoder(handler.request_deserializer),
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _unary(handler.unary_unary, self._refused),
            _decoder(handler.request_deserializer),
            handler.response_serializer,
        )


def _decoder(deserialize: Any) -> Any:
    # What a deserializer raises, gRPC answers with UNKNOWN: it is handed on instead.
    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return error

    return decode


def _decoded(request: Any) -> Any:
    if isinstance(request, DecodeError):
        raise InvalidInput("the request is not a message of this method")
    return request


async def _all_decoded(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decoded(request)


def _unary(method: Any, refused: Callable[[str], None]) -> Any:
    async def call(request: Any, context: Context) -> Any:
        try:
            return await method(_decoded(request), context)
        except HillInferError as error:
            await _abort(context, error, refused)
        except Exception as error:
            await _abort_unexpected(context, error, refused)

    return call


def _stream(method: Any, refused: Callable[[str], None]) -> Any:
    async def call(requests: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for response in method(_all_decoded(requests), context):
                yield response
        except HillInferError as error:
            await _abort(context, error, refused)
        except Exception as error:
            await _abort_unexpected(context, error, refused)

    return call


async def _abort(context: Context, error: HillInferError, refused: Callable[[str], None]) -> None:
    name = name_of(error)
    refused(name)
    log.debug("call refused", error=name, reason=error)
    # A message may quote what the client sent; its end matters least.
    message = str(error).encode()[:_LONGEST_MESSAGE].decode(errors="ignore")
    await context.abort(grpc.StatusCode[error.status], message, ((ERROR_KEY, name),))


async def _abort_unexpected(context: Context, error: Exception, refused: Callable[[str], None]) -> None:
    # gRPC's own way to end a call is an exception too.
    if isinstance(error, grpc.aio.AbortError):
        raise error
    log.exception("unexpected error in a call")
    name = HillInferError.__name__
    refused(name)
    await context.abort(
        grpc.StatusCode.INTERNAL, "internal error; see the daemon's log", ((ERROR_KEY, name),)
    )
