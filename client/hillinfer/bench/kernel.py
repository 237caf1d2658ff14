"""`hillinfer bench kernel`: the host kernel beside a streaming read of the same bytes, and its peers."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hillinfer.bench.peers import PEERS, Winners, rows_of
from hillinfer.progress import Progress
from hillinfer_core import kernel, reference
from hillinfer_core.errors import HillInferError
from hillinfer_core.layout import TILE_TOKENS, Precision, tile_bytes


@dataclass(frozen=True)
class Shape:
    """What is ranked: one layer of a context, one query for each KV head (reduction sum)."""

    name: str
    tokens: int
    kv_heads: int
    head_dim: int


SHAPES = (
    Shape("8B", 131_072, 8, 128),
    Shape("8B, 32K", 32_768, 8, 128),
    Shape("96 wide", 65_536, 8, 96),
    Shape("needle-8m", 65_536, 2, 64),
)
"""The first is the one that is summed up. needle-8m is the bundled model, at its longest context."""

ALPHA = 0.02
"""Winners as a fraction of the tokens: the default budget."""


class PeerMismatchError(HillInferError):
    """A peer's result is not the kernel's: the comparison would mean nothing."""


def bench_kernel(repeats: int, progress: Progress, shapes: tuple[Shape, ...] = SHAPES) -> dict[str, Any]:
    """Measure all shapes, `repeats` interleaved rounds each; return what `--json` prints.

    Takes about 1.3 GB. Raises `PeerMismatchError` for a peer that finds something else, before it is timed.
    """
    with progress("kernel", len(shapes) * len(Precision)) as tick:
        measured: list[dict[str, Any]] = []
        for shape in shapes:
            results: dict[str, Any] = {}
            for precision in Precision:
                results[precision.value] = _measure(shape, precision, repeats)
                tick(len(measured) * len(Precision) + len(results))
            measured.append({
                "name": shape.name, "tokens": shape.tokens, "kv_heads": shape.kv_heads,
                "head_dim": shape.head_dim, "k": _winners(shape), **results,
            })  # fmt: skip
    main = measured[0]
    return {
        "int8": _without_peers(main["int8"]),
        "int4": _without_peers(main["int4"]),
        "topk_overhead": max(main[p.value]["topk_overhead"] for p in Precision),
        "peers": {name: _peer_summary(main, name) for name in PEERS},
        "shapes": measured,
        "machine": {
            "processor": _processor(), "threads": kernel.threads(), "instructions": kernel.variants(),
            "repeats": repeats,
        },
    }  # fmt: skip


def _winners(shape: Shape) -> int:
    return max(1, int(shape.tokens * ALPHA))


def _without_peers(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "peers"}


def _peer_summary(main: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    each = {precision.value: main[precision.value]["peers"][name] for precision in Precision}
    return None if None in each.values() else each


def _measure(shape: Shape, precision: Precision, repeats: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    tiles = shape.tokens // TILE_TOKENS
    keys = rng.integers(
        0, 256, (shape.kv_heads, tiles, tile_bytes(shape.head_dim, precision)), dtype=np.uint8
    )
    q = rng.integers(-127, 128, (shape.kv_heads, 1, shape.head_dim)).astype(np.int8)
    k, end = _winners(shape), shape.tokens
    jobs: dict[str, Callable[[], object]] = {
        "stream": lambda: kernel.stream_read(keys.reshape(-1)),
        "scores": lambda: kernel.rank([keys], q, precision, 0, end, 0),
        "rank": lambda: kernel.rank([keys], q, precision, 0, end, k),
        "rank_histogram": lambda: kernel.rank([keys], q, precision, 0, end, k, histogram=True),
        "rank_checksums": lambda: kernel.rank(
            [keys], q, precision, 0, end, k, histogram=True, checksums=True
        ),
    }
    times = _interleaved(jobs, repeats)
    seconds = {name: statistics.median(each) for name, each in times.items()}

    def ratio(one: str, other: str) -> float:
        # Round by round: what else runs on the machine then weighs on both.
        return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))

    return {
        "bytes": keys.nbytes,
        "bytes_per_s": keys.nbytes / seconds["scores"],
        "stream_bytes_per_s": keys.nbytes / seconds["stream"],
        "fraction_of_stream": ratio("stream", "scores"),
        "fraction_of_stream_with_topk": ratio("stream", "rank_histogram"),
        "topk_overhead": ratio("rank_histogram", "scores") - 1,
        "topk_alone_overhead": ratio("rank", "scores") - 1,
        "ms": {name: value * 1e3 for name, value in seconds.items()},
        "peers": _measure_peers(keys, q, precision, k, repeats),
    }


def _measure_peers(
    keys: reference.U8, q: reference.I8, precision: Precision, k: int, repeats: int
) -> dict[str, Any]:
    rows = rows_of(reference.from_tiles(keys, precision), precision)
    expected = kernel.rank([keys], q, precision, 0, rows.shape[1], k)
    jobs: dict[str, Callable[[], object]] = {
        "kernel": lambda: kernel.rank([keys], q, precision, 0, rows.shape[1], k)
    }
    for name, make in PEERS.items():
        peer = make(precision)
        if peer is None:
            continue
        _verify(name, peer(rows, q[:, 0], k), expected)
        jobs[name] = lambda peer=peer: peer(rows, q[:, 0], k)  # type: ignore[misc]  # of a lambda's default
    times = _interleaved(jobs, max(3, repeats // 4))
    seconds = {name: statistics.median(each) for name, each in times.items()}
    return {
        name: {"ms": seconds[name] * 1e3, "times_slower": seconds[name] / seconds["kernel"]}
        if name in seconds
        else None
        for name in PEERS
    }


def _verify(name: str, found: Winners, expected: reference.Ranked) -> None:
    ids, scores = (np.asarray(part).astype(np.int64) for part in found)
    same = bool(np.array_equal(np.sort(scores, axis=1), np.sort(expected.scores.astype(np.int64), axis=1)))
    # Of equal scores at the threshold a peer may take others.
    above = expected.scores > expected.scores.min(axis=1, keepdims=True)
    for head in range(len(ids)):
        same = same and bool(np.isin(expected.ids[head][above[head]], ids[head]).all())
    if not same:
        raise PeerMismatchError(f"{name} ranks differently from the kernel; its version may be at fault")


def _interleaved(jobs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each in every round; within a round one follows the other."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    return times


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
