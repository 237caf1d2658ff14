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
    REDUCTION_NONE: _ClassVar[Reduction]
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
REDUCTION_NONE: Reduction

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
    __slots__ = ("layers", "kv_heads", "head_dim", "dtype", "precision", "durable_name", "base_name", "labels", "base_uid")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    DURABLE_NAME_FIELD_NUMBER: _ClassVar[int]
    BASE_NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    BASE_UID_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    head_dim: int
    dtype: DType
    precision: Precision
    durable_name: str
    base_name: str
    labels: _containers.ScalarMap[str, str]
    base_uid: int
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., precision: _Optional[_Union[Precision, str]] = ..., durable_name: _Optional[str] = ..., base_name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., base_uid: _Optional[int] = ...) -> None: ...

class OpenContextResponse(_message.Message):
    __slots__ = ("context_id", "append_unit", "append_limit", "layer_tokens", "tail_tokens", "evaluation_key_bytes", "checksum_bytes", "durable_id", "content_checksum")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    APPEND_UNIT_FIELD_NUMBER: _ClassVar[int]
    APPEND_LIMIT_FIELD_NUMBER: _ClassVar[int]
    LAYER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TAIL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_KEY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DURABLE_ID_FIELD_NUMBER: _ClassVar[int]
    CONTENT_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    context_id: int
    append_unit: int
    append_limit: int
    layer_tokens: _containers.RepeatedScalarFieldContainer[int]
    tail_tokens: _containers.RepeatedScalarFieldContainer[int]
    evaluation_key_bytes: int
    checksum_bytes: int
    durable_id: str
    content_checksum: int
    def __init__(self, context_id: _Optional[int] = ..., append_unit: _Optional[int] = ..., append_limit: _Optional[int] = ..., layer_tokens: _Optional[_Iterable[int]] = ..., tail_tokens: _Optional[_Iterable[int]] = ..., evaluation_key_bytes: _Optional[int] = ..., checksum_bytes: _Optional[int] = ..., durable_id: _Optional[str] = ..., content_checksum: _Optional[int] = ...) -> None: ...

class CloseContextRequest(_message.Message):
    __slots__ = ("context_id",)
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    context_id: int
    def __init__(self, context_id: _Optional[int] = ...) -> None: ...

class CloseContextResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AppendRequest(_message.Message):
    __slots__ = ("context_id", "layer", "first_token", "tokens", "rows", "tail")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    context_id: int
    layer: int
    first_token: int
    tokens: int
    rows: Region
    tail: bool
    def __init__(self, context_id: _Optional[int] = ..., layer: _Optional[int] = ..., first_token: _Optional[int] = ..., tokens: _Optional[int] = ..., rows: _Optional[_Union[Region, _Mapping]] = ..., tail: bool = ...) -> None: ...

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
    __slots__ = ("context_id", "first_token", "end_token", "k", "query", "ids", "scores", "held", "rows", "histogram", "scales")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    HISTOGRAM_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    context_id: int
    first_token: int
    end_token: int
    k: int
    query: Region
    ids: Region
    scores: Region
    held: Region
    rows: Region
    histogram: Region
    scales: Region
    def __init__(self, context_id: _Optional[int] = ..., first_token: _Optional[int] = ..., end_token: _Optional[int] = ..., k: _Optional[int] = ..., query: _Optional[_Union[Region, _Mapping]] = ..., ids: _Optional[_Union[Region, _Mapping]] = ..., scores: _Optional[_Union[Region, _Mapping]] = ..., held: _Optional[_Union[Region, _Mapping]] = ..., rows: _Optional[_Union[Region, _Mapping]] = ..., histogram: _Optional[_Union[Region, _Mapping]] = ..., scales: _Optional[_Union[Region, _Mapping]] = ...) -> None: ...

class EvaluateResponse(_message.Message):
    __slots__ = ("results", "answered_at")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_AT_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[EvaluationResult]
    answered_at: float
    def __init__(self, results: _Optional[_Iterable[_Union[EvaluationResult, _Mapping]]] = ..., answered_at: _Optional[float] = ...) -> None: ...

class EvaluationResult(_message.Message):
    __slots__ = ("generation", "missing_per_head", "rows_brought", "evaluated_bytes", "read_bytes", "scan_s")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MISSING_PER_HEAD_FIELD_NUMBER: _ClassVar[int]
    ROWS_BROUGHT_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    SCAN_S_FIELD_NUMBER: _ClassVar[int]
    generation: int
    missing_per_head: _containers.RepeatedScalarFieldContainer[int]
    rows_brought: int
    evaluated_bytes: int
    read_bytes: int
    scan_s: float
    def __init__(self, generation: _Optional[int] = ..., missing_per_head: _Optional[_Iterable[int]] = ..., rows_brought: _Optional[int] = ..., evaluated_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., scan_s: _Optional[float] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("context_id", "layer", "by_ids", "range", "tail", "keys", "rows")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    BY_IDS_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    context_id: int
    layer: int
    by_ids: Ids
    range: TokenRange
    tail: Tail
    keys: KeyRange
    rows: Region
    def __init__(self, context_id: _Optional[int] = ..., layer: _Optional[int] = ..., by_ids: _Optional[_Union[Ids, _Mapping]] = ..., range: _Optional[_Union[TokenRange, _Mapping]] = ..., tail: _Optional[_Union[Tail, _Mapping]] = ..., keys: _Optional[_Union[KeyRange, _Mapping]] = ..., rows: _Optional[_Union[Region, _Mapping]] = ...) -> None: ...

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

class Tail(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KeyRange(_message.Message):
    __slots__ = ("first_token", "end_token", "scales")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    first_token: int
    end_token: int
    scales: Region
    def __init__(self, first_token: _Optional[int] = ..., end_token: _Optional[int] = ..., scales: _Optional[_Union[Region, _Mapping]] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("read_bytes", "generation", "key_checksums")
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    KEY_CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    read_bytes: int
    generation: int
    key_checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, read_bytes: _Optional[int] = ..., generation: _Optional[int] = ..., key_checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class SaveContextRequest(_message.Message):
    __slots__ = ("context_id", "gid")
    CONTEXT_ID_FIELD_NUMBER: _ClassVar[int]
    GID_FIELD_NUMBER: _ClassVar[int]
    context_id: int
    gid: int
    def __init__(self, context_id: _Optional[int] = ..., gid: _Optional[int] = ...) -> None: ...

class SaveContextResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListContextsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListContextsResponse(_message.Message):
    __slots__ = ("contexts",)
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    contexts: _containers.RepeatedCompositeFieldContainer[DurableContext]
    def __init__(self, contexts: _Optional[_Iterable[_Union[DurableContext, _Mapping]]] = ...) -> None: ...

class DurableContext(_message.Message):
    __slots__ = ("name", "uid", "saved", "tokens", "extent_bytes", "layers", "kv_heads", "head_dim", "dtype", "precision", "labels", "created_unix_s", "users", "drive", "gid")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXTENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    USERS_FIELD_NUMBER: _ClassVar[int]
    DRIVE_FIELD_NUMBER: _ClassVar[int]
    GID_FIELD_NUMBER: _ClassVar[int]
    name: str
    uid: int
    saved: bool
    tokens: int
    extent_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: DType
    precision: Precision
    labels: _containers.ScalarMap[str, str]
    created_unix_s: int
    users: int
    drive: str
    gid: int
    def __init__(self, name: _Optional[str] = ..., uid: _Optional[int] = ..., saved: bool = ..., tokens: _Optional[int] = ..., extent_bytes: _Optional[int] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., precision: _Optional[_Union[Precision, str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., created_unix_s: _Optional[int] = ..., users: _Optional[int] = ..., drive: _Optional[str] = ..., gid: _Optional[int] = ...) -> None: ...

class DeleteContextRequest(_message.Message):
    __slots__ = ("name", "uid")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    name: str
    uid: int
    def __init__(self, name: _Optional[str] = ..., uid: _Optional[int] = ...) -> None: ...

class DeleteContextResponse(_message.Message):
    __slots__ = ("freed_bytes",)
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    def __init__(self, freed_bytes: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("version", "uptime_s", "device", "pool", "sessions", "drives", "draining")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    DRIVES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    version: str
    uptime_s: float
    device: DeviceStatus
    pool: PoolStatus
    sessions: _containers.RepeatedCompositeFieldContainer[SessionStatus]
    drives: _containers.RepeatedCompositeFieldContainer[DriveStatus]
    draining: bool
    def __init__(self, version: _Optional[str] = ..., uptime_s: _Optional[float] = ..., device: _Optional[_Union[DeviceStatus, _Mapping]] = ..., pool: _Optional[_Union[PoolStatus, _Mapping]] = ..., sessions: _Optional[_Iterable[_Union[SessionStatus, _Mapping]]] = ..., drives: _Optional[_Iterable[_Union[DriveStatus, _Mapping]]] = ..., draining: bool = ...) -> None: ...

class DriveStatus(_message.Message):
    __slots__ = ("name", "state", "device", "pool", "durable_contexts", "durable_bytes", "reason", "usage", "waiting")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    DURABLE_CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    device: DeviceStatus
    pool: PoolStatus
    durable_contexts: int
    durable_bytes: int
    reason: str
    usage: Usage
    waiting: int
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., device: _Optional[_Union[DeviceStatus, _Mapping]] = ..., pool: _Optional[_Union[PoolStatus, _Mapping]] = ..., durable_contexts: _Optional[int] = ..., durable_bytes: _Optional[int] = ..., reason: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., waiting: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("pieces", "queue_s", "device_s", "written_bytes", "read_bytes", "evaluated_bytes", "winners", "missing")
    PIECES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_S_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WINNERS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    pieces: int
    queue_s: float
    device_s: float
    written_bytes: int
    read_bytes: int
    evaluated_bytes: int
    winners: int
    missing: int
    def __init__(self, pieces: _Optional[int] = ..., queue_s: _Optional[float] = ..., device_s: _Optional[float] = ..., written_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., evaluated_bytes: _Optional[int] = ..., winners: _Optional[int] = ..., missing: _Optional[int] = ...) -> None: ...

class DeviceStatus(_message.Message):
    __slots__ = ("driver", "path", "direct_io", "worker_pid", "worker_restarts", "written_bytes", "read_bytes", "evaluated_bytes", "evaluation_key_bytes", "evaluation_key_limit_bytes", "profile", "streamed_bytes")
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
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    STREAMED_BYTES_FIELD_NUMBER: _ClassVar[int]
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
    profile: str
    streamed_bytes: int
    def __init__(self, driver: _Optional[str] = ..., path: _Optional[str] = ..., direct_io: bool = ..., worker_pid: _Optional[int] = ..., worker_restarts: _Optional[int] = ..., written_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., evaluated_bytes: _Optional[int] = ..., evaluation_key_bytes: _Optional[int] = ..., evaluation_key_limit_bytes: _Optional[int] = ..., profile: _Optional[str] = ..., streamed_bytes: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("session_id", "client_name", "pid", "uid", "arena_bytes", "contexts", "age_s", "weight", "requests", "usage")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    client_name: str
    pid: int
    uid: int
    arena_bytes: int
    contexts: _containers.RepeatedCompositeFieldContainer[ContextStatus]
    age_s: float
    weight: float
    requests: int
    usage: Usage
    def __init__(self, session_id: _Optional[int] = ..., client_name: _Optional[str] = ..., pid: _Optional[int] = ..., uid: _Optional[int] = ..., arena_bytes: _Optional[int] = ..., contexts: _Optional[_Iterable[_Union[ContextStatus, _Mapping]]] = ..., age_s: _Optional[float] = ..., weight: _Optional[float] = ..., requests: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

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
