"""Rewrites another process's arena as fast as it can, until its input ends.

Arguments: descriptor of the arena, what to write: "rows" (float16, finite but for a NaN that comes and goes),
or "bytes" (of any kind, small numbers among them).
"""

from __future__ import annotations

import mmap
import os
import select
import sys

import numpy as np

CHUNK = 4096


def main() -> None:
    fd, kind = int(sys.argv[1]), sys.argv[2]
    memory = np.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), np.uint8)
    rng = np.random.default_rng(int(sys.argv[3]))
    fresh = _finite(rng) if kind == "rows" else _anything(rng)
    print("ready", flush=True)
    rounds, numbers = 0, memory.view(np.float16)
    while rounds % 64 or not select.select([sys.stdin], [], [], 0)[0]:
        start = int(rng.integers(0, len(memory) // CHUNK)) * CHUNK
        memory[start : start + CHUNK] = fresh[rounds % len(fresh)]
        if kind == "rows" and rounds % 64 == 0:
            numbers = memory[start : start + CHUNK].view(np.float16)
            numbers[7] = np.nan
        elif rounds % 64 == 3:
            numbers[7] = 1
        rounds += 1
    print(rounds, flush=True)


def _finite(rng: np.random.Generator) -> np.ndarray:
    scale = 2.0 ** rng.integers(-4, 5, (64, 1))
    return (rng.standard_normal((64, CHUNK // 2)) * scale).astype(np.float16).view(np.uint8)


def _anything(rng: np.random.Generator) -> np.ndarray:
    any_bytes = rng.integers(0, 256, (64, CHUNK), np.uint8)
    small = rng.integers(0, 300, (64, CHUNK // 4), np.uint32).view(np.uint8)
    return np.where(rng.random((64, 1)) < 0.5, any_bytes, small)


if __name__ == "__main__":
    main()
