"""The native extension; :mod:`hillinfer_core.kernel` checks arguments and is what to call."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

def supported(variant: int) -> bool: ...
def environment(name: str, /) -> str | None: ...
def extremes(numbers: npt.NDArray[np.int32], /) -> tuple[int, int]: ...
def first_difference(
    rows: npt.NDArray[np.uint8], checksums: npt.NDArray[np.uint32], hardware: bool, /
) -> int: ...
def widen_keys(
    rows: npt.NDArray[np.uint8], format: int, tokens: int, dim: int, out: npt.NDArray[np.float32], /
) -> None: ...
def quantise_keys(
    rows: npt.NDArray[np.uint8],
    format: int,
    tokens: int,
    zero: npt.NDArray[np.float32],
    inverse_scale: npt.NDArray[np.float32],
    bits: int,
    tiles: npt.NDArray[np.uint8],
    /,
) -> tuple[int, int]: ...
def quantise_query(
    query: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    zero: npt.NDArray[np.float32],
    sum: bool,
    q: npt.NDArray[np.int8],
    offsets: npt.NDArray[np.int32],
    sigma: npt.NDArray[np.float32],
    /,
) -> bool: ...
def scores(
    variant: int,
    tiles: npt.NDArray[np.uint8],
    q: npt.NDArray[np.int8] | npt.NDArray[np.int16],
    offsets: npt.NDArray[np.int32],
    bits: int,
    out: npt.NDArray[np.int32],
    /,
) -> None: ...

class Cancel:
    """Asks a call that was given it to stop; it stays set."""

    def __init__(self) -> None: ...
    def set(self) -> None:
        """Ask; from any thread."""

    def is_set(self) -> bool:
        """Return whether it was asked."""

def rank(
    variant: int,
    threads: int,
    parts: Sequence[npt.NDArray[np.uint8]],
    heads: int,
    q: npt.NDArray[np.int8] | npt.NDArray[np.int16],
    offsets: npt.NDArray[np.int32],
    bits: int,
    origin: int,
    first: int,
    end: int,
    ids: npt.NDArray[np.uint32],
    scores: npt.NDArray[np.int32],
    histogram: npt.NDArray[np.uint32] | None,
    checksums: npt.NDArray[np.uint32] | None,
    cancel: Cancel | None,
    /,
) -> bool: ...
def stream_read(variant: int, threads: int, data: npt.NDArray[np.uint8], /) -> int: ...
def top_k(
    scores: npt.NDArray[np.int32],
    first_id: int,
    ids: npt.NDArray[np.uint32],
    chosen: npt.NDArray[np.int32],
    /,
) -> None: ...
def row_checksums(hardware: bool, rows: npt.NDArray[np.uint8], out: npt.NDArray[np.uint32], /) -> None: ...
def data_checksums(variant: int, tiles: npt.NDArray[np.uint8], out: npt.NDArray[np.uint32], /) -> None: ...
def quantise_query_of(
    arena: npt.NDArray[np.uint8],
    offset: int,
    scale: npt.NDArray[np.float32],
    zero: npt.NDArray[np.float32],
    sum: bool,
    q: npt.NDArray[np.int8],
    offsets: npt.NDArray[np.int32],
    group: int,
    /,
) -> int: ...
def evaluate(
    arena: npt.NDArray[np.uint8],
    query_at: int,
    group: int,
    sum: bool,
    scale: npt.NDArray[np.float32],
    zero: npt.NDArray[np.float32],
    variant: int,
    threads: int,
    parts: Sequence[npt.NDArray[np.uint8]],
    bits: int,
    origin: int,
    first: int,
    end: int,
    k: int,
    ids_at: int,
    scores_at: int | None,
    held_at: int,
    held_count: int,
    extents: npt.NDArray[np.int64],
    row_bytes: int,
    tokens: int,
    sums: npt.NDArray[np.uint32],
    most: int,
    found: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.uint64],
    checksums: npt.NDArray[np.uint32],
    /,
) -> tuple[int, tuple[list[int], int], float]: ...
def hand_over(
    arena: npt.NDArray[np.uint8],
    ids: npt.NDArray[np.uint32],
    ids_at: int,
    scores: npt.NDArray[np.int32],
    scores_at: int | None,
    held_at: int,
    held_count: int,
    end: int,
    extents: npt.NDArray[np.int64],
    row_bytes: int,
    tokens: int,
    sums: npt.NDArray[np.uint32],
    most: int,
    found: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.uint64],
    checksums: npt.NDArray[np.uint32],
    /,
) -> tuple[list[int], int] | None: ...
def exchange(
    slots: npt.NDArray[np.uint32],
    hot: npt.NDArray[np.uint32],
    wanted: npt.NDArray[np.uint32],
    counts: npt.NDArray[np.int64],
    tokens: int,
    threads: int,
    ids: npt.NDArray[np.uint32],
    places: npt.NDArray[np.int64],
    of_heads: npt.NDArray[np.int64],
    /,
) -> list[int] | None: ...
def count_hits(
    hits: npt.NDArray[np.uint16],
    ids: npt.NDArray[np.uint32],
    counts: npt.NDArray[np.int64],
    hit: int,
    most: int,
    threads: int,
    /,
) -> bool: ...
def keep(
    hot: npt.NDArray[np.uint32],
    hits: npt.NDArray[np.uint16],
    ids: npt.NDArray[np.uint32],
    counts: npt.NDArray[np.int64],
    threads: int,
    which: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    /,
) -> int | None: ...
def turn_over(
    slots: npt.NDArray[np.uint32],
    keys: npt.NDArray[np.uint8],
    values: npt.NDArray[np.uint8],
    pinned: int,
    hot: npt.NDArray[np.uint32],
    hits: npt.NDArray[np.uint16],
    hot_rows: npt.NDArray[np.uint8],
    wanted: npt.NDArray[np.uint32],
    tokens: int,
    missing: Sequence[int],
    rows: npt.NDArray[Any],
    hit: int,
    halve: bool,
    /,
) -> bool | None: ...
def attend(
    variant: int,
    format: int,
    keys: npt.NDArray[np.uint8],
    values: npt.NDArray[np.uint8],
    query: npt.NDArray[np.float32],
    scaling: float,
    out: npt.NDArray[np.float32],
    /,
) -> bool: ...
def make_query(
    variant: int,
    hidden: npt.NDArray[np.float32],
    norm: npt.NDArray[np.float32],
    epsilon: float,
    weight: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32] | None,
    head_norm: npt.NDArray[np.float32] | None,
    head_epsilon: float,
    cosines: npt.NDArray[np.float32],
    sines: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
    /,
) -> bool: ...
def is_near(vectors: npt.NDArray[np.float32], others: npt.NDArray[np.float32], most: float, /) -> bool: ...
def put_tokens(
    keys: npt.NDArray[Any],
    values: npt.NDArray[Any],
    new_keys: npt.NDArray[Any],
    new_values: npt.NDArray[Any],
    places: Sequence[int],
    /,
) -> bool: ...
def join_rows(
    keys: npt.NDArray[np.uint8],
    values: npt.NDArray[np.uint8],
    pinned: int,
    places: npt.NDArray[np.int64],
    threads: int,
    out: npt.NDArray[np.uint8],
    /,
) -> bool: ...
def split_rows(
    rows: npt.NDArray[np.uint8],
    which: npt.NDArray[np.int64] | None,
    keys: npt.NDArray[np.uint8],
    values: npt.NDArray[np.uint8],
    pinned: int,
    places: npt.NDArray[np.int64],
    threads: int,
    /,
) -> bool: ...
def put_rows(
    rows: npt.NDArray[np.uint8],
    which: npt.NDArray[np.int64] | None,
    out: npt.NDArray[np.uint8],
    places: npt.NDArray[np.int64] | None,
    threads: int,
    /,
) -> bool: ...
def locate(
    extents: npt.NDArray[np.int64],
    row_bytes: int,
    tokens: int,
    sums: npt.NDArray[np.uint32],
    heads: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.uint64],
    checksums: npt.NDArray[np.uint32],
    /,
) -> bool: ...
def is_memory(fd: int) -> bool: ...
def copy_rows(
    memory: npt.NDArray[np.uint8], offsets: npt.NDArray[np.uint64], out: npt.NDArray[np.uint8]
) -> bool: ...
def gather(
    fd: int, offsets: npt.NDArray[np.uint64], out: npt.NDArray[Any], direct: bool, depth: int, /
) -> tuple[int, int]: ...
def read_range(fd: int, offset: int, out: npt.NDArray[np.uint8], direct: bool, /) -> None: ...
def write_range(fd: int, offset: int, data: npt.NDArray[np.uint8], direct: bool, /) -> None: ...
def direct_alignment(fd: int, /) -> tuple[int, int] | None: ...
def punch_hole(fd: int, offset: int, length: int, /) -> None: ...

class RingProducer:
    """What :class:`hillinfer_core.ring.Producer` is made of."""

    def __init__(self, memory: npt.NDArray[np.uint8], number: int, at: int, /) -> None: ...
    def put(self, ticket: int, code: int, timeout_ms: int, payload: bytes, doorbell: int, /) -> int: ...

class RingConsumer:
    """What :class:`hillinfer_core.ring.Consumer` is made of."""

    def __init__(self, memory: npt.NDArray[np.uint8], number: int, at: int, /) -> None: ...
    def take(self) -> list[tuple[int, int, int, bytes]] | str: ...
    def wait(
        self, doorbell: int, connection: int, timeout_s: float, /
    ) -> list[tuple[int, int, int, bytes]] | int | str: ...

class Repeats:
    """What ``hillinferd.worker.repeats`` is made of."""

    def __init__(self, few: int, many: int, many_from: int, /) -> None: ...
    def keep(
        self,
        session: int,
        asked: bytes,
        arena: npt.NDArray[np.uint8],
        query_at: int,
        group: int,
        sum: bool,
        scale: npt.NDArray[np.float32],
        zero: npt.NDArray[np.float32],
        variant: int,
        parts: Sequence[npt.NDArray[np.uint8]],
        bits: int,
        origin: int,
        k: int,
        ids_at: int,
        scores_at: int | None,
        held_at: int,
        held_count: int,
        extents: npt.NDArray[np.int64],
        row_bytes: int,
        tokens: int,
        sums: npt.NDArray[np.uint32],
        rows_at: int,
        most: int,
        generation: int,
        key_bytes: int,
        memory: npt.NDArray[np.uint8] | None,
        fd: int,
        direct: bool,
        depth: int,
        capacity: int,
        /,
    ) -> None: ...
    def clear(self) -> None: ...
    def next(self, sock: int, /) -> tuple[bytes, int]: ...

class Express:
    """What ``hillinferd.service.express`` is made of; a rider is known by its doorbell's descriptor."""

    def __init__(self) -> None: ...
    def add(
        self,
        session: int,
        submissions: RingConsumer,
        completions: RingProducer,
        submitted: int,
        completed: int,
        /,
    ) -> None: ...
    def remove(self, submitted: int, /) -> None: ...
    def permit(self, submitted: int, asked: bytes, held: list[int], drive: int, worker: int, /) -> bool: ...
    def revoke(self) -> None: ...
    @property
    def permitted(self) -> bool: ...
    def wait(self, epoll: int, timeout_s: float, /) -> list[tuple[int, int]]: ...
    def take_flight(self) -> tuple[int, int, float, int, int, int, bytes, bytes] | None: ...
    def take_waiting(self) -> tuple[int, list[float]] | None: ...
    def take_runs(self) -> list[tuple[int, int, list[float], list[float], list[int], int, int, int]]: ...
    def take_left(self) -> list[int]: ...
