"""``python -m hillinferd.bench.storage``: the host driver against fio, or a profile against its figures."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hillinfer_core.errors import ConfigError, HillInferError

from ..driver.block import is_block_device
from ..driver.header import HEADER_BYTES
from ..driver.storage import Storage, aligned
from .pacing import measure_profile

APPEND_BYTES = 1 << 20
ROW_BYTES = 4096
DEPTH = 32
ROWS = 1024
_FIRST = 1 << 20  # of a pool, so that fio never writes to its header


@dataclass(frozen=True)
class Comparison:
    """One workload: medians of fio and of us in ``unit``, and the median of the ratios round by round."""

    workload: str
    unit: str
    fio: float
    ours: float
    ratio: float
    ratios: tuple[float, ...]


def compare_with_fio(path: Path, size: int, rounds: int, seconds: float) -> list[Comparison]:
    """Run fio and a :class:`Storage` in turn on one pool at ``path`` of ``size`` bytes.

    ``rounds`` of each, ``seconds`` long; a drive's speed drifts, so what is compared lies side by side.
    ``path`` is a file, which is made and filled, or a formatted block device, whose content is overwritten.
    Raises :class:`ConfigError` without fio, and what :class:`Storage` raises.
    """
    if not shutil.which("fio"):
        raise ConfigError("fio is not installed; on Debian: apt-get install fio")
    storage = Storage(path, 0 if is_block_device(path) else size, keep=True)
    try:
        size = min(size, storage.capacity) // APPEND_BYTES * APPEND_BYTES
        block = aligned(8 << 20)
        block[:] = np.random.default_rng(0).integers(0, 256, block.size, np.uint8)
        for offset in range(_FIRST, size, block.size):
            storage.write(offset, block.data[: size - offset])
        storage.flush()
        append = _Append(storage, size, block)
        gather = _Gather(storage, size)
        return [
            _compare(
                f"append, {APPEND_BYTES >> 10} KiB, depth 1", "MB/s", rounds,
                lambda: _fio(storage, size, seconds, "write", APPEND_BYTES, 1),
                lambda: append.run(seconds),
            ),
            _compare(
                f"gather, {ROW_BYTES >> 10} KiB, depth {DEPTH}", "rows/s", rounds,
                lambda: _fio(storage, size, seconds, "randread", ROW_BYTES, DEPTH),
                lambda: gather.run(seconds),
            ),
        ]  # fmt: skip
    finally:
        storage.close()


class _Append:
    """Appends from the first byte to the last and over again."""

    def __init__(
        self, storage: Storage, size: int, block: np.ndarray[tuple[int], np.dtype[np.uint8]]
    ) -> None:
        self._storage, self._size, self._block = storage, size, block.data[:APPEND_BYTES]
        self._offset = _FIRST

    def run(self, seconds: float) -> float:
        """Return MB a second."""
        started, done = time.perf_counter(), 0
        while (took := time.perf_counter() - started) < seconds:
            self._storage.write(self._offset, self._block)
            done += APPEND_BYTES
            self._offset += APPEND_BYTES
            if self._offset + APPEND_BYTES > self._size:
                self._offset = _FIRST
        return done / took / 1e6


class _Gather:
    """Gathers rows from random pages."""

    def __init__(self, storage: Storage, size: int) -> None:
        self._storage = storage
        self._rows = aligned(ROWS * ROW_BYTES).reshape(ROWS, ROW_BYTES)
        pages = np.random.default_rng().integers(HEADER_BYTES // 4096, size // 4096, (1 << 8, ROWS))
        self._offsets = (pages * 4096).astype(np.uint64)
        storage.depth = DEPTH

    def run(self, seconds: float) -> float:
        """Return rows a second."""
        started, done = time.perf_counter(), 0
        while (took := time.perf_counter() - started) < seconds:
            self._storage.gather(self._offsets[done % len(self._offsets)], self._rows)
            done += 1
        return done * ROWS / took


def _compare(
    workload: str, unit: str, rounds: int, fio: Callable[[], float], ours: Callable[[], float]
) -> Comparison:
    # In turn which is first: whatever the one leaves to the other, both meet it.
    theirs, own = [], []
    for turn in range(rounds):
        for kind in ("fio", "ours") if turn % 2 else ("ours", "fio"):
            if kind == "fio":
                theirs.append(fio())
            else:
                own.append(ours())
    ratios = tuple(b / a for a, b in zip(theirs, own, strict=True))
    return Comparison(
        workload, unit, statistics.median(theirs), statistics.median(own), statistics.median(ratios), ratios
    )


def _fio(storage: Storage, size: int, seconds: float, kind: str, block: int, depth: int) -> float:
    """Return MB/s of a write, reads/s else."""
    command = [
        "fio", "--name=bench", f"--filename={storage.path}", f"--rw={kind}", f"--bs={block}",
        f"--iodepth={depth}", f"--direct={int(storage.direct_io)}", "--ioengine=libaio", "--time_based",
        f"--runtime={round(seconds * 1000)}ms", f"--offset={_FIRST}", f"--size={size - _FIRST}",
        "--norandommap", "--randrepeat=0", "--allow_file_create=0", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job["write"]["bw_bytes"]) / 1e6 if kind == "write" else float(job["read"]["iops"])


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure and print; an error is one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m hillinferd.bench.storage", description=__doc__)
    parser.add_argument("--path", type=Path, help="pool: a file to make, or a formatted device, overwritten")
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of the pool to use (1 GiB)")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each, in turn (9)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a run (1)")
    parser.add_argument("--profile", help="measure this profile against its figures instead: smartssd")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        if options.path and options.path.exists() and not is_block_device(options.path):
            raise ConfigError(f"{options.path} exists; name a file to make")
        if options.path and is_block_device(options.path):
            _measure(options, options.path)
            return
        home = options.path.parent if options.path else Path("/dev/shm" if options.profile else ".")
        with tempfile.TemporaryDirectory(prefix="hillinfer-bench-", dir=home) as directory:
            _measure(options, Path(directory) / "pool")
    except (HillInferError, OSError) as error:
        print(f"bench storage: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _measure(options: argparse.Namespace, path: Path) -> None:
    if options.profile:
        figures = measure_profile(path, options.profile, options.size, options.seconds)
        if options.as_json:
            print(json.dumps([asdict(figure) for figure in figures], indent=2))
            return
        print(f"{'':34}{'profile':>12}{'one client':>12}{'off':>8}{'four':>12}{'off':>8}")
        for figure in figures:
            print(
                f"{figure.name + ', ' + figure.unit:34}{figure.expected:12,.1f}{figure.one:12,.1f}"
                f"{figure.off(figure.one):>8}{figure.four:12,.1f}{figure.off(figure.four):>8}"
            )
        return
    rows = compare_with_fio(path, options.size, options.rounds, options.seconds)
    if options.as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    print(f"{'':34}{'fio':>12}{'ours':>12}{'ratio':>8}   ratios")
    for row in rows:
        ratios = " ".join(f"{ratio:.2f}" for ratio in sorted(row.ratios))
        name = f"{row.workload}, {row.unit}"
        print(f"{name:34}{row.fio:12,.0f}{row.ours:12,.0f}{row.ratio:8.2f}   {ratios}")


if __name__ == "__main__":
    main()
