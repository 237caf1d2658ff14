"""What moves the boundary of a layer: estimates of both sides, learned from its rankings."""

from __future__ import annotations

from dataclasses import dataclass

from hillinfer.split.boundary import BLOCK_TOKENS, LEAST_GAIN, Boundary, Stop, choose
from hillinfer.split.estimates import LATEST, Estimate
from hillinfer.split.trial import Taken, Trial

PROBE_EVERY = 128
"""Rankings in one way, alone or together, after which the other is looked at again. Our choice."""

MOST_EVERY = 1024
"""At most as many, each time twice as many as before while dividing does not pay: a look shrinks the hot pool
for its mirrored keys. Our choice."""

_PROBES = LATEST // 2 + 1  # at each look: as many as move a median; the first ones also fill caches

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
    tokens, the CPU's, fixed; None to have it follow the measured speeds, and to divide only while that pays:
    where the sides' estimates promise something, a `Trial` of whole rankings decides. least_gain: share of a
    ranking alone that dividing must save, half of it once it is divided; negative to divide always. turn:
    the layer's number, so that not all look at the other way in one step.
    """

    def __init__(self, share: float | None = None, least_gain: float = LEAST_GAIN, turn: int = 0) -> None:
        self.share = share
        self.cpu, self.drive = Estimate(), Estimate()
        """Of both sides while both work."""
        self.boundary = Boundary(0, Stop.no_gain, 0.0, 0.0)
        """Of the latest ranking; set by whoever ranks."""
        self._least_gain = least_gain
        self._turn = turn % PROBE_EVERY
        self._every = PROBE_EVERY // 2
        self._alone = 0  # rankings by the drive alone, all
        self._pays = least_gain < 0
        self._trial: Trial | None = None
        self._due_in = 0  # rankings until the other way is looked at
        self._seen = 0  # rankings by both since that was due

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
        # The first rankings bring code, keys and rows into the caches.
        if self._alone < _PROBES or min(limit, tokens - BLOCK_TOKENS) < BLOCK_TOKENS:
            self._trial = None
            return Boundary(0, Stop.memory if limit < BLOCK_TOKENS <= tokens else Stop.no_gain, 0, 0)
        if self._due_in and not self._pays:
            return Boundary(0, Stop.no_gain, 0, 0)
        if self._seen < _PROBES:
            probe = min(limit, tokens // _PROBE_SHARE) // BLOCK_TOKENS * BLOCK_TOKENS
            return Boundary(max(BLOCK_TOKENS, probe), Stop.probe, 0, 0)
        follow = self._balanced(tokens, limit, bytes_per_token, -1.0)
        if self._trial is not None or self._due_in or self._least_gain < 0:
            return follow
        if not self._pays:
            promised = self._balanced(tokens, limit, bytes_per_token, self._least_gain)
            if not promised.cpu_tokens:
                self._settle()
                return promised
        self._trial = Trial()
        return follow

    def _balanced(self, tokens: int, limit: int, bytes_per_token: int, least_gain: float) -> Boundary:
        # Ranking only: what the second request costs, and whether the drive is faster alone, a trial shows.
        alone_s, current = self.drive.seconds(tokens * bytes_per_token), self.boundary.cpu_tokens
        return choose(tokens, current, limit, bytes_per_token, self.cpu, self.drive, alone_s, 0.0, least_gain)

    def is_due_alone(self) -> bool:
        """Whether the drive is to rank everything all the same, to see what that takes."""
        return self._trial is not None and self._trial.alone_is_next

    def saw_alone(self, seconds: float, rows: int) -> None:
        """Learn from a whole ranking by the drive alone that missed so many ``rows``."""
        self._alone += 1
        if self._trial is not None:
            self._trial.alone.append(Taken(seconds, rows))
        self._decide()

    def saw(self, times: Times, seconds: float, rows: int) -> None:
        """Learn from a whole ranking by both that missed so many ``rows``."""
        self.cpu.observe(times.cpu_bytes, times.cpu_s, times.cpu_scan_s)
        self.drive.observe(times.drive_bytes, times.drive_s, times.drive_scan_s)
        self._seen += 1
        if self._trial is not None:
            self._trial.together.append(Taken(seconds, rows))
        self._decide()

    def _decide(self) -> None:
        self._due_in = max(0, self._due_in - 1)
        if self._trial is not None and self._trial.over:
            needed = self._least_gain / 2 if self._pays else self._least_gain
            self._pays = self._trial.saved() >= needed
            self._trial = None
            self._settle()

    def _settle(self) -> None:
        self._every = PROBE_EVERY if self._pays else min(2 * self._every, MOST_EVERY)
        self._due_in, self._seen = self._every + self._turn, _PROBES if self._pays else 0
