from hillinfer_core.v1 import cold_pool_pb2 as _cold_pool_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DrainRequest(_message.Message):
    __slots__ = ("on",)
    ON_FIELD_NUMBER: _ClassVar[int]
    on: bool
    def __init__(self, on: bool = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("on", "sessions", "contexts", "requests")
    ON_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    on: bool
    sessions: int
    contexts: int
    requests: int
    def __init__(self, on: bool = ..., sessions: _Optional[int] = ..., contexts: _Optional[int] = ..., requests: _Optional[int] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    def __init__(self, session_id: _Optional[int] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ("client_name", "pid", "uid")
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    client_name: str
    pid: int
    uid: int
    def __init__(self, client_name: _Optional[str] = ..., pid: _Optional[int] = ..., uid: _Optional[int] = ...) -> None: ...

class CecStatusRequest(_message.Message):
    __slots__ = ("drive",)
    DRIVE_FIELD_NUMBER: _ClassVar[int]
    drive: str
    def __init__(self, drive: _Optional[str] = ...) -> None: ...

class CecStatusResponse(_message.Message):
    __slots__ = ("cards",)
    CARDS_FIELD_NUMBER: _ClassVar[int]
    cards: _containers.RepeatedCompositeFieldContainer[CecCard]
    def __init__(self, cards: _Optional[_Iterable[_Union[CecCard, _Mapping]]] = ...) -> None: ...

class CecLoadRequest(_message.Message):
    __slots__ = ("drive", "name")
    DRIVE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    drive: str
    name: str
    def __init__(self, drive: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class CecLoadResponse(_message.Message):
    __slots__ = ("card",)
    CARD_FIELD_NUMBER: _ClassVar[int]
    card: CecCard
    def __init__(self, card: _Optional[_Union[CecCard, _Mapping]] = ...) -> None: ...

class CecRollbackRequest(_message.Message):
    __slots__ = ("drive",)
    DRIVE_FIELD_NUMBER: _ClassVar[int]
    drive: str
    def __init__(self, drive: _Optional[str] = ...) -> None: ...

class CecRollbackResponse(_message.Message):
    __slots__ = ("card",)
    CARD_FIELD_NUMBER: _ClassVar[int]
    card: CecCard
    def __init__(self, card: _Optional[_Union[CecCard, _Mapping]] = ...) -> None: ...

class CecCard(_message.Message):
    __slots__ = ("card", "interface_uuids", "loaded_uuid", "good_loaded", "good", "previous", "catalogue", "contexts", "drive")
    CARD_FIELD_NUMBER: _ClassVar[int]
    INTERFACE_UUIDS_FIELD_NUMBER: _ClassVar[int]
    LOADED_UUID_FIELD_NUMBER: _ClassVar[int]
    GOOD_LOADED_FIELD_NUMBER: _ClassVar[int]
    GOOD_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    CATALOGUE_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    DRIVE_FIELD_NUMBER: _ClassVar[int]
    card: str
    interface_uuids: _containers.RepeatedScalarFieldContainer[str]
    loaded_uuid: str
    good_loaded: bool
    good: Bitstream
    previous: Bitstream
    catalogue: _containers.RepeatedCompositeFieldContainer[Bitstream]
    contexts: int
    drive: str
    def __init__(self, card: _Optional[str] = ..., interface_uuids: _Optional[_Iterable[str]] = ..., loaded_uuid: _Optional[str] = ..., good_loaded: bool = ..., good: _Optional[_Union[Bitstream, _Mapping]] = ..., previous: _Optional[_Union[Bitstream, _Mapping]] = ..., catalogue: _Optional[_Iterable[_Union[Bitstream, _Mapping]]] = ..., contexts: _Optional[int] = ..., drive: _Optional[str] = ...) -> None: ...

class Bitstream(_message.Message):
    __slots__ = ("file", "sha256", "kernel", "precision", "head_dims", "interface_uuid")
    FILE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIMS_FIELD_NUMBER: _ClassVar[int]
    INTERFACE_UUID_FIELD_NUMBER: _ClassVar[int]
    file: str
    sha256: str
    kernel: str
    precision: _cold_pool_pb2.Precision
    head_dims: _containers.RepeatedScalarFieldContainer[int]
    interface_uuid: str
    def __init__(self, file: _Optional[str] = ..., sha256: _Optional[str] = ..., kernel: _Optional[str] = ..., precision: _Optional[_Union[_cold_pool_pb2.Precision, str]] = ..., head_dims: _Optional[_Iterable[int]] = ..., interface_uuid: _Optional[str] = ...) -> None: ...
