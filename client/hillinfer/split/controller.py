"""What moves the boundary of a layer: estimates of both sides, learned from its rankings."""

from __future__ import annotations

from dataclasses import dataclass

from hillinfer.split.boundary import BLOCK_TOKENS, LEAST_GAIN, Boundary, Stop, choose
from hillinfer.split.estimates import Estimate, Latest

PROBE_EVERY = 128
"""Rankings in one way, alone or together, after which the other is looked at again. Our choice."""

_PROBES = 3  # in each way, at first: one of them also brings code, keys or rows into the caches

_PROBE_SHARE = 8  # a probe is of an eighth of the tokens: of much less, what is fixed in a scan is most


@dataclass(frozen=True)
class Times:
    """Of a ranking in which both sides worked, in seconds from its beginning; scans are parts of them.

    cpu_bytes, drive_bytes: of evaluation keys that each side scanned.
    """

    cpu_bytes: int
    cpu_s: float
    cpu_scan_s: float
    drive_bytes: int
    drive_s: float
    drive_scan_s: float

    @property
    def imbalance(self) -> float:
        """Difference of both as a share of the larger."""
        return abs(self.cpu_s - self.drive_s) / max(self.cpu_s, self.drive_s)


class Controller:
    """The boundary of one layer. Not thread-safe.

    Layers differ: a drive may hold the keys of one in fast memory and stream those of another. share: of the
    tokens, the CPU's, fixed; None to have it follow the measured speeds. least_gain: as `choose` of
    boundary.py has it. turn: the layer's number, so that not all look at the other way in one step.
    """

    def __init__(self, share: float | None = None, least_gain: float = LEAST_GAIN, turn: int = 0) -> None:
        self.share = share
        self.cpu, self.drive, self.alone = Estimate(), Estimate(), Estimate()
        """Of both sides while both work, and of the drive alone, its rows included."""
        self.rows = Latest()
        """Seconds of the second request, for rows."""
        self.boundary = Boundary(0, Stop.no_gain, 0.0, 0.0)
        """Of the latest ranking; set by whoever ranks."""
        self._least_gain = least_gain
        self._split = False
        self._turn = turn
        self._in_a_row = 0  # rankings of the kind that the last one was

    def choose(self, tokens: int, limit: int, bytes_per_token: int) -> Boundary:
        """Choose for a ranking of ``tokens``, at most ``limit`` of them the CPU's.

        Where the drive ranks everything, the CPU is given a probe now and then.
        """
        if self.share is not None:
            cpu = min(round(self.share * tokens), limit) // BLOCK_TOKENS * BLOCK_TOKENS
            times = (
                self.cpu.seconds(cpu * bytes_per_token),
                self.drive.seconds((tokens - cpu) * bytes_per_token),
            )
            return Boundary(cpu, Stop.fixed, *times)
        # The first ranking alone brings every row of its selection: a split would seem to save all that.
        if self.alone.observations < _PROBES or min(limit, tokens - BLOCK_TOKENS) < BLOCK_TOKENS:
            return Boundary(0, Stop.memory if limit < BLOCK_TOKENS <= tokens else Stop.no_gain, 0, 0)
        if self.cpu.observations < _PROBES or (not self._split and self._is_due()):
            probe = min(limit, tokens // _PROBE_SHARE) // BLOCK_TOKENS * BLOCK_TOKENS
            return Boundary(max(BLOCK_TOKENS, probe), Stop.probe, 0, 0)
        current = self.boundary.cpu_tokens
        alone_s, extra_s = self.alone.seconds(tokens * bytes_per_token), self.rows.median
        return choose(
            tokens, current, limit, bytes_per_token, self.cpu, self.drive, alone_s, extra_s, self._least_gain
        )

    def is_due_alone(self) -> bool:
        """Whether the drive is to rank everything once, to see what that takes while the CPU does nothing."""
        follows = self.share is None and self._least_gain >= 0
        return follows and self._split and self._is_due()

    def _is_due(self) -> bool:
        return self._in_a_row >= PROBE_EVERY + self._turn % PROBE_EVERY

    def saw_alone(self, nbytes: int, waited_s: float, scan_s: float) -> None:
        """Learn from a ranking of ``nbytes`` by the drive alone."""
        self.alone.observe(nbytes, waited_s, scan_s)
        self._count(split=False)

    def saw(self, times: Times) -> None:
        """Learn from a ranking by both."""
        self.cpu.observe(times.cpu_bytes, times.cpu_s, times.cpu_scan_s)
        self.drive.observe(times.drive_bytes, times.drive_s, times.drive_scan_s)
        self._count(split=True)

    def _count(self, split: bool) -> None:
        self._in_a_row = 1 + (self._in_a_row if split is self._split else 0)
        self._split = split
