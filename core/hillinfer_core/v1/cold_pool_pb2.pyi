from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]

class Precision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRECISION_UNSPECIFIED: _ClassVar[Precision]
    PRECISION_INT8: _ClassVar[Precision]
    PRECISION_INT4: _ClassVar[Precision]

class Reduction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REDUCTION_UNSPECIFIED: _ClassVar[Reduction]
    REDUCTION_SUM: _ClassVar[Reduction]
    REDUCTION_MAX: _ClassVar[Reduction]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT16: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT32: DType
PRECISION_UNSPECIFIED: Precision
PRECISION_INT8: Precision
PRECISION_INT4: Precision
REDUCTION_UNSPECIFIED: Reduction
REDUCTION_SUM: Reduction
REDUCTION_MAX: Reduction

class Region(_message.Message):
    __slots__ = ("offset", "length", "generation")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    offset: int
    length: int
    generation: int
    def __init__(self, offset: _Optional[int] = ..., length: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class OpenContextRequest(_message.Message):
    __slots__ = ("layers", "kv_heads", "head_dim", "dtype", "precision")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    head_dim: int
    dtype: DType
    precision: Precision
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., precision: _Optional[_Union[Precision, str]] = ...) -> None: ...

class OpenContextResponse(_message.Message):
    __slots__ = ("context_id", "append_unit")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    APPEND_UNIT_FIELD_NUMBER: _ClassVar[int]
    context_id: int
    append_unit: int
    def __init__(self, context_id: _Optional[int] = ..., append_unit: _Optional[int] = ...) -> None: ...

class CloseContextRequest(_message.Message):
    __slots__ = ("context_id",)
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    context_id: int
    def __init__(self, context_id: _Optional[int] = ...) -> None: ...

class CloseContextResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AppendRequest(_message.Message):
    __slots__ = ("context_id", "layer", "first_token", "tokens", "rows")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    context_id: int
    layer: int
    first_token: int
    tokens: int
    rows: Region
    def __init__(self, context_id: _Optional[int] = ..., layer: _Optional[int] = ..., first_token: _Optional[int] = ..., tokens: _Optional[int] = ..., rows: _Optional[_Union[Region, _Mapping]] = ...) -> None: ...

class AppendResponse(_message.Message):
    __slots__ = ("layer_tokens", "evaluation_key_bytes", "checksum_bytes")
    LAYER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_KEY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    layer_tokens: int
    evaluation_key_bytes: int
    checksum_bytes: int
    def __init__(self, layer_tokens: _Optional[int] = ..., evaluation_key_bytes: _Optional[int] = ..., checksum_bytes: _Optional[int] = ...) -> None: ...

class EvaluateRequest(_message.Message):
    __slots__ = ("layer", "query_heads", "reduction", "evaluations")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    QUERY_HEADS_FIELD_NUMBER: _ClassVar[int]
    REDUCTION_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    query_heads: int
    reduction: Reduction
    evaluations: _containers.RepeatedCompositeFieldContainer[Evaluation]
    def __init__(self, layer: _Optional[int] = ..., query_heads: _Optional[int] = ..., reduction: _Optional[_Union[Reduction, str]] = ..., evaluations: _Optional[_Iterable[_Union[Evaluation, _Mapping]]] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("context_id", "first_token", "end_token", "k", "query", "ids", "scores", "held", "rows")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    context_id: int
    first_token: int
    end_token: int
    k: int
    query: Region
    ids: Region
    scores: Region
    held: Region
    rows: Region
    def __init__(self, context_id: _Optional[int] = ..., first_token: _Optional[int] = ..., end_token: _Optional[int] = ..., k: _Optional[int] = ..., query: _Optional[_Union[Region, _Mapping]] = ..., ids: _Optional[_Union[Region, _Mapping]] = ..., scores: _Optional[_Union[Region, _Mapping]] = ..., held: _Optional[_Union[Region, _Mapping]] = ..., rows: _Optional[_Union[Region, _Mapping]] = ...) -> None: ...

class EvaluateResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[EvaluationResult]
    def __init__(self, results: _Optional[_Iterable[_Union[EvaluationResult, _Mapping]]] = ...) -> None: ...

class EvaluationResult(_message.Message):
    __slots__ = ("generation", "missing_per_head", "rows_brought", "evaluated_bytes", "read_bytes")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MISSING_PER_HEAD_FIELD_NUMBER: _ClassVar[int]
    ROWS_BROUGHT_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    generation: int
    missing_per_head: _containers.RepeatedScalarFieldContainer[int]
    rows_brought: int
    evaluated_bytes: int
    read_bytes: int
    def __init__(self, generation: _Optional[int] = ..., missing_per_head: _Optional[_Iterable[int]] = ..., rows_brought: _Optional[int] = ..., evaluated_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("context_id", "layer", "by_ids", "range", "rows")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    BY_IDS_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    context_id: int
    layer: int
    by_ids: Ids
    range: TokenRange
    rows: Region
    def __init__(self, context_id: _Optional[int] = ..., layer: _Optional[int] = ..., by_ids: _Optional[_Union[Ids, _Mapping]] = ..., range: _Optional[_Union[TokenRange, _Mapping]] = ..., rows: _Optional[_Union[Region, _Mapping]] = ...) -> None: ...

class Ids(_message.Message):
    __slots__ = ("count_per_head", "ids")
    COUNT_PER_HEAD_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    count_per_head: _containers.RepeatedScalarFieldContainer[int]
    ids: Region
    def __init__(self, count_per_head: _Optional[_Iterable[int]] = ..., ids: _Optional[_Union[Region, _Mapping]] = ...) -> None: ...

class TokenRange(_message.Message):
    __slots__ = ("first_token", "count")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    first_token: int
    count: int
    def __init__(self, first_token: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("read_bytes",)
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    read_bytes: int
    def __init__(self, read_bytes: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("version", "uptime_s", "device", "pool", "sessions")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    version: str
    uptime_s: float
    device: DeviceStatus
    pool: PoolStatus
    sessions: _containers.RepeatedCompositeFieldContainer[SessionStatus]
    def __init__(self, version: _Optional[str] = ..., uptime_s: _Optional[float] = ..., device: _Optional[_Union[DeviceStatus, _Mapping]] = ..., pool: _Optional[_Union[PoolStatus, _Mapping]] = ..., sessions: _Optional[_Iterable[_Union[SessionStatus, _Mapping]]] = ...) -> None: ...

class DeviceStatus(_message.Message):
    __slots__ = ("driver", "path", "direct_io", "worker_pid", "worker_restarts", "written_bytes", "read_bytes", "evaluated_bytes", "evaluation_key_bytes", "evaluation_key_limit_bytes")
    DRIVER_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    DIRECT_IO_FIELD_NUMBER: _ClassVar[int]
    WORKER_PID_FIELD_NUMBER: _ClassVar[int]
    WORKER_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_KEY_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_KEY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    driver: str
    path: str
    direct_io: bool
    worker_pid: int
    worker_restarts: int
    written_bytes: int
    read_bytes: int
    evaluated_bytes: int
    evaluation_key_bytes: int
    evaluation_key_limit_bytes: int
    def __init__(self, driver: _Optional[str] = ..., path: _Optional[str] = ..., direct_io: bool = ..., worker_pid: _Optional[int] = ..., worker_restarts: _Optional[int] = ..., written_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., evaluated_bytes: _Optional[int] = ..., evaluation_key_bytes: _Optional[int] = ..., evaluation_key_limit_bytes: _Optional[int] = ...) -> None: ...

class PoolStatus(_message.Message):
    __slots__ = ("capacity_bytes", "used_bytes", "extents")
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXTENTS_FIELD_NUMBER: _ClassVar[int]
    capacity_bytes: int
    used_bytes: int
    extents: int
    def __init__(self, capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., extents: _Optional[int] = ...) -> None: ...

class SessionStatus(_message.Message):
    __slots__ = ("session_id", "client_name", "pid", "uid", "arena_bytes", "contexts")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    client_name: str
    pid: int
    uid: int
    arena_bytes: int
    contexts: _containers.RepeatedCompositeFieldContainer[ContextStatus]
    def __init__(self, session_id: _Optional[int] = ..., client_name: _Optional[str] = ..., pid: _Optional[int] = ..., uid: _Optional[int] = ..., arena_bytes: _Optional[int] = ..., contexts: _Optional[_Iterable[_Union[ContextStatus, _Mapping]]] = ...) -> None: ...

class ContextStatus(_message.Message):
    __slots__ = ("context_id", "tokens", "extent_bytes", "layers", "kv_heads", "head_dim", "dtype", "precision")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXTENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    context_id: int
    tokens: int
    extent_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: DType
    precision: Precision
    def __init__(self, context_id: _Optional[int] = ..., tokens: _Optional[int] = ..., extent_bytes: _Optional[int] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., precision: _Optional[_Union[Precision, str]] = ...) -> None: ...
