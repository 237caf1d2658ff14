"""`hillinfer bench sharing`: several applications of several users on one daemon, what each gets."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hillinfer import wire
from hillinfer.progress import Progress
from hillinfer_core import protocol
from hillinfer_core.errors import DaemonUnavailable, HillInferError

WEIGHTS = (1, 2, 4)

_GROUP = 65534
_USERS = (65531, 65532, 65533)
"""Users of the weights 1, 2 and 4, when root runs this: nobody's numbers, which need no account."""

_START_S = 30.0
_LEAD_S = 0.3


@dataclass
class Figure:
    """One figure, measured once in each round."""

    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds)

    def __str__(self) -> str:
        low, high = min(self.rounds), max(self.rounds)
        return f"{self.median:.3g} ({low:.3g} to {high:.3g})"


@dataclass
class Sharing:
    """What `measure` found. Rates in evaluations a second, latencies in milliseconds, shares of the whole."""

    alone: Figure = field(default_factory=Figure)
    together: Figure = field(default_factory=Figure)
    throughput_ratio: Figure = field(default_factory=Figure)
    jain: Figure = field(default_factory=Figure)
    shares: dict[int, Figure] = field(default_factory=dict)
    p50_alone_ms: Figure = field(default_factory=Figure)
    p99_alone_ms: Figure = field(default_factory=Figure)
    p50_beside_append_ms: Figure = field(default_factory=Figure)
    p99_beside_append_ms: Figure = field(default_factory=Figure)
    p99_ratio: Figure = field(default_factory=Figure)
    appended_mb_per_s: Figure = field(default_factory=Figure)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything, with a median beside the rounds of each figure."""
        told = {name: value for name, value in asdict(self).items() if name not in ("shares", "settings")}
        for name, value in told.items():
            value["median"] = getattr(self, name).median
        shares = {
            str(weight): asdict(figure) | {"median": figure.median} for weight, figure in self.shares.items()
        }
        return {**told, "shares": shares, "settings": self.settings}


def measure(pool_dir: Path, tokens: int, rounds: int, seconds: float, progress: Progress) -> Sharing:
    """Measure `rounds` times, everything in turn in each, every part for `seconds`.

    A private daemon is started under the profile smartssd, its pool of 2 GiB in `pool_dir`. Root gives the
    applications to users of different weights; without root all are of one user, and shares by weight are
    not measured. Raises `DaemonUnavailable` when the daemon or an application does not start.
    """
    found = Sharing()
    root = os.getuid() == 0
    users = [_USERS[0], _USERS[0], 0, 0, *_USERS[1:]] if root else [os.getuid()] * 4
    found.settings = {
        "tokens": tokens, "seconds": seconds, "rounds": rounds, "profile": "smartssd", "users": users[:4],
        "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(),
    }  # fmt: skip
    with ExitStack() as stack:
        socket = stack.enter_context(_daemon(pool_dir))
        applications = [
            stack.enter_context(_application(socket, user, tokens, seed)) for seed, user in enumerate(users)
        ]
        for application in applications:
            application.answer()
        with progress("sharing", rounds) as tick:
            for number in range(rounds):
                _round(found, applications, seconds, root)
                tick(number + 1)
    return found


def _round(found: Sharing, applications: Sequence[_Application], seconds: float, root: bool) -> None:
    first, four = applications[0], applications[:4]
    (alone,) = _together([first], seconds)
    counts = [len(done) for done in _together(four, seconds)]
    found.alone.rounds.append(len(alone) / seconds)
    found.together.rounds.append(sum(counts) / seconds)
    found.throughput_ratio.rounds.append(sum(counts) / len(alone))
    found.jain.rounds.append(sum(counts) ** 2 / (len(counts) * sum(count**2 for count in counts)))
    if root:
        weighted = [len(done) for done in _together([first, *applications[4:]], seconds, depth=2)]
        for weight, count in zip(WEIGHTS, weighted, strict=True):
            found.shares.setdefault(weight, Figure()).rounds.append(count / sum(weighted))

    (alone,) = _together([first], seconds)
    start = time.monotonic() + _LEAD_S
    appending = four[3]
    appending.ask(work="append", start=start, seconds=seconds)
    first.ask(work="evaluate", start=start, seconds=seconds, depth=1)
    beside, appended = (
        [done for done in each.answer() if done[0] <= start + seconds] for each in (first, appending)
    )
    for name, done in (("alone", alone), ("beside_append", beside)):
        latencies = 1e3 * np.array([latency for _, latency in done])
        getattr(found, f"p50_{name}_ms").rounds.append(float(np.percentile(latencies, 50)))
        getattr(found, f"p99_{name}_ms").rounds.append(float(np.percentile(latencies, 99)))
    found.p99_ratio.rounds.append(found.p99_beside_append_ms.rounds[-1] / found.p99_alone_ms.rounds[-1])
    found.appended_mb_per_s.rounds.append(len(appended) * _APPEND_BYTES / seconds / 1e6)


_APPEND_BYTES = 2048 * 8 * 2 * 128 * 2
"""Rows of one append of :mod:`hillinfer.bench.sharing_client`."""


def _together(
    applications: Sequence[_Application], seconds: float, depth: int = 1
) -> list[list[tuple[float, float]]]:
    """Have all evaluate at the same time; return what each finished within it."""
    start = time.monotonic() + _LEAD_S
    for application in applications:
        application.ask(work="evaluate", start=start, seconds=seconds, depth=depth)
    answers = [application.answer() for application in applications]
    return [[each for each in done if each[0] <= start + seconds] for done in answers]


class _Application:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, **what: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise DaemonUnavailable("an application of the benchmark ended; its message is above")
        return json.loads(line)


@contextmanager
def _application(socket: Path, user: int, tokens: int, seed: int) -> Iterator[_Application]:
    told = {"socket": str(socket), "uid": user, "gid": _GROUP, "tokens": tokens, "seed": seed}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "hillinfer.bench.sharing_client", json.dumps(told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield _Application(process)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _daemon(pool_dir: Path) -> Iterator[Path]:
    """A daemon whose sockets the group of the applications may use."""
    directory = Path(tempfile.mkdtemp(prefix="hillinfer-sharing-", dir="/tmp"))
    pool = pool_dir / f"{directory.name}.pool"
    config = directory / "hillinferd.toml"
    lines = [f'runtime_dir = "{directory}"', f'pool = "{pool}"', 'pool_capacity = "2GiB"']
    lines += ['profile = "smartssd"', "[user_weights]"]
    lines += [f"{user} = {weight}" for user, weight in zip(_USERS, WEIGHTS, strict=True)]
    config.write_text("\n".join(lines))
    if os.getuid() == 0:
        os.chown(directory, 0, _GROUP)
        # New sockets get the directory's group.
        directory.chmod(0o2770)
    log = directory / "hillinferd.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hillinferd", "--config", str(config), "--die-with-parent"],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip
    try:
        socket = protocol.attach_socket(directory)
        _wait_for(socket, process, log)
        yield socket
    finally:
        process.terminate()
        process.wait()
        for path in pool_dir.glob(f"{pool.name}*"):
            path.unlink()
        shutil.rmtree(directory, ignore_errors=True)


def _wait_for(socket: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            wire.attach(socket, 0, "start-up check", 1.0, ring=False)[0].close()
            return
        except HillInferError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise DaemonUnavailable(f"hillinferd did not start: {log.read_text()[-500:]}") from None
            time.sleep(0.05)


def as_markdown(found: Sharing) -> str:
    """The tables of docs/performance.md: medians, and in brackets the least and the greatest round."""
    rows = [
        ("one application alone", f"{found.alone} evaluations/s", ""),
        ("four of two users, together", f"{found.together} evaluations/s", ""),
        ("together / alone", str(found.throughput_ratio), "at least 0.9"),
        ("Jain index of the four", str(found.jain), "at least 0.95"),
        *(
            (f"share at weight {weight} of {sum(WEIGHTS)}", str(figure),
             f"{weight / sum(WEIGHTS):.3f} within 10 %")
            for weight, figure in found.shares.items()
        ),
        ("p50, p99 of a decode step alone", f"{found.p50_alone_ms}, {found.p99_alone_ms} ms", ""),
        ("p50, p99 beside a bulk append", f"{found.p50_beside_append_ms}, {found.p99_beside_append_ms} ms",
         ""),
        ("p99 beside / alone", str(found.p99_ratio), "at most 2"),
        ("rows appended meanwhile", f"{found.appended_mb_per_s} MB/s", ""),
    ]  # fmt: skip
    if not found.shares:
        rows.append(("shares by weight", "not measured: only root can have several users", ""))
    return "\n".join(
        ["| | measured | wanted |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    )
