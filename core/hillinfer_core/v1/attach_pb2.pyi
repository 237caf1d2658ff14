from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachRequest(_message.Message):
    __slots__ = ("protocol_version", "layout_version", "client_name", "arena_bytes", "ring")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    RING_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    layout_version: int
    client_name: str
    arena_bytes: int
    ring: bool
    def __init__(self, protocol_version: _Optional[int] = ..., layout_version: _Optional[int] = ..., client_name: _Optional[str] = ..., arena_bytes: _Optional[int] = ..., ring: bool = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("accepted", "refused")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    refused: Refused
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("session_id", "token", "grpc_address", "arena_bytes", "arena_generation", "server_version", "instance")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    ARENA_GENERATION_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    token: str
    grpc_address: str
    arena_bytes: int
    arena_generation: int
    server_version: str
    instance: str
    def __init__(self, session_id: _Optional[int] = ..., token: _Optional[str] = ..., grpc_address: _Optional[str] = ..., arena_bytes: _Optional[int] = ..., arena_generation: _Optional[int] = ..., server_version: _Optional[str] = ..., instance: _Optional[str] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("error", "message")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    error: str
    message: str
    def __init__(self, error: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
