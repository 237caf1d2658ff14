"""Where a layer's tokens are divided: the drive ranks the older ones, the CPU the newer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hillinfer.split.estimates import Estimate

BLOCK_TOKENS = 256
"""Tokens that the boundary moves by: some 16 KiB of keys a head, read in one request. Our choice."""

HYSTERESIS = 0.075
"""Imbalance, of the larger time, up to which the boundary stays. Our choice: half of the 15 % aimed at."""

LEAST_GAIN = 0.1
"""Share of the drive's time alone that a split must save, else the drive ranks everything. Our choice."""


class Stop(StrEnum):
    """Why a boundary is where it is although the sides' times differ."""

    none = "balanced"
    no_gain = "at its end: the drive alone is as fast"
    memory = "at its limit of memory"
    all_cpu = "at its end: the drive ranks one block"
    block = "as near as a block allows"
    probe = "a probe of the CPU's speed"
    fixed = "fixed"


@dataclass(frozen=True)
class Boundary:
    """``cpu_tokens`` at the end of the range are the CPU's; times are estimates in seconds for it."""

    cpu_tokens: int
    stop: Stop
    cpu_s: float
    drive_s: float

    @property
    def imbalance(self) -> float:
        """Difference of the times as a share of the larger, 0 to 1."""
        larger = max(self.cpu_s, self.drive_s)
        return abs(self.cpu_s - self.drive_s) / larger if larger else 0.0


def choose(
    tokens: int,
    current: int,
    limit: int,
    bytes_per_token: int,
    cpu: Estimate,
    drive: Estimate,
    alone_s: float,
    extra_s: float,
    least_gain: float = LEAST_GAIN,
) -> Boundary:
    """Choose how many of ``tokens`` the CPU ranks: whole blocks, at most ``limit`` tokens.

    ``current`` are its tokens now; both estimates are known, and of rankings in which both sides worked.
    ``alone_s`` is what the drive takes for everything while the CPU ranks nothing: less than ``drive`` has it
    where both share cores or memory. ``extra_s`` is what a split costs besides, the second request for rows.
    Where it saves less than ``least_gain``, the drive gets everything; a split that is there stays until it
    saves less than half of that. A negative ``least_gain`` always splits, by a block at least.
    """

    def times(share: int) -> tuple[float, float]:
        return cpu.seconds(share * bytes_per_token), drive.seconds((tokens - share) * bytes_per_token)

    def at(share: int, stop: Stop) -> Boundary:
        return Boundary(share, stop, *times(share))

    # A side that ranks nothing is not seen to become faster.
    most = max(0, min(limit, tokens - BLOCK_TOKENS)) // BLOCK_TOKENS * BLOCK_TOKENS
    if most == 0:
        return at(0, Stop.memory if limit < BLOCK_TOKENS <= tokens else Stop.no_gain)
    pace = (cpu.s_per_byte + drive.s_per_byte) * bytes_per_token
    even = (drive.seconds(tokens * bytes_per_token) - cpu.overhead_s) / pace
    least = BLOCK_TOKENS if least_gain < 0 else 0
    wanted = min(max(round(even / BLOCK_TOKENS) * BLOCK_TOKENS, least), most)
    kept = 0 < current <= most and at(current, Stop.none).imbalance <= HYSTERESIS
    share = current if kept else wanted
    saved = alone_s - max(times(share)) - extra_s
    needed = least_gain / 2 if current else least_gain
    if share == 0 or (least_gain >= 0 and saved < needed * alone_s):
        return at(0, Stop.no_gain)
    chosen = at(share, Stop.none)
    if chosen.imbalance <= HYSTERESIS:
        return chosen
    if share == most and even > most:
        return at(share, Stop.memory if limit < tokens - BLOCK_TOKENS else Stop.all_cpu)
    return at(share, Stop.block)
