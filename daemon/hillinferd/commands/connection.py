"""Asking a running daemon, and showing its answers."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, MutableSequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.message import Message

from hillinfer_core.attach_socket import connect
from hillinfer_core.errors import DaemonUnavailable, HillInferError, by_name
from hillinfer_core.protocol import (
    ERROR_KEY,
    LAYOUT_VERSION,
    MAX_PACKET,
    PROTOCOL_VERSION,
    TOKEN_KEY,
    attach_socket,
    default_runtime_dir,
)
from hillinfer_core.v1 import attach_pb2

TIMEOUT_S = 10.0
"""Longest that the daemon may take to answer, unless a command says otherwise. Our choice."""

SocketOption = Annotated[
    Path | None, typer.Option("--socket", help="attach socket (default: in the runtime directory)")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object; sizes are bytes")]

Call = Callable[..., Any]
"""Calls a method of a stub: ``call(stub.Status, request)``, with a ``timeout`` in seconds if need be."""


@contextmanager
def connected(path: Path | None) -> Iterator[tuple[grpc.Channel, Call]]:
    """Attach to the daemon at ``path``, by default the one of this machine or user, without an arena.

    Yields a channel for stubs, and what calls their methods. Both raise :class:`DaemonUnavailable` if no
    daemon answers, else its own typed error.
    """
    path = path or attach_socket(default_runtime_dir())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        accepted = _attach(connection, path)

        def call(method: Any, request: Message, timeout: float = TIMEOUT_S) -> Any:
            try:
                return method(request, timeout=timeout, metadata=((TOKEN_KEY, accepted.token),))
            except grpc.RpcError as error:
                raise _typed(error) from None

        with grpc.insecure_channel(accepted.grpc_address) as channel:
            yield channel, call


def _attach(connection: socket.socket, path: Path) -> attach_pb2.Accepted:
    try:
        connect(connection, path, TIMEOUT_S)
        request = attach_pb2.AttachRequest(
            protocol_version=PROTOCOL_VERSION, layout_version=LAYOUT_VERSION, client_name="hillinferctl"
        )
        connection.send(request.SerializeToString())
        reply = attach_pb2.AttachReply.FromString(connection.recv(MAX_PACKET))
    except OSError as error:
        raise DaemonUnavailable(
            f"no daemon answers at {path} ({error.strerror or error}); "
            "start hillinferd, or name its socket with --socket"
        ) from None
    if not reply.HasField("accepted"):
        raise by_name(reply.refused.error)(reply.refused.message or f"the daemon at {path} hung up")
    return reply.accepted


def _typed(error: grpc.RpcError) -> HillInferError:
    if not isinstance(error, grpc.Call):
        return DaemonUnavailable(str(error))
    name = next((value for key, value in error.trailing_metadata() or () if key == ERROR_KEY), None)
    kind = by_name(str(name)) if name else DaemonUnavailable
    return kind(error.details() or "the daemon does not answer")


def to_plain(message: Message) -> dict[str, Any]:
    """Return ``message`` as JSON-ready values: every field present, integers as integers, enums by name."""
    plain: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if isinstance(value, Mapping):
            plain[field.name] = dict(value)
        elif isinstance(value, MutableSequence):
            plain[field.name] = [_value(field, item) for item in value]
        else:
            plain[field.name] = _value(field, value)
    return plain


def _value(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return to_plain(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value
