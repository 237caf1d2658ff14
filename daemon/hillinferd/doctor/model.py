"""What a check looks at and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ..discovery.model import Inventory, SmartSsd


class Verdict(StrEnum):
    """The outcome of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"


_GRAVITY = (Verdict.NOT_APPLICABLE, Verdict.OK, Verdict.WARNING, Verdict.FAILED)


@dataclass(frozen=True)
class Finding:
    """A verdict with what was seen and, where something is to be done, what."""

    verdict: Verdict
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """A finding under the name of its check."""

    name: str
    verdict: Verdict
    detail: str
    remedy: str


@dataclass(frozen=True)
class Machine:
    """What the checks look at; sizes in bytes.

    ``inventory`` is None and ``trouble`` says why where discovery does not work. ``pool`` is where the cold
    pool is or would be: a file, a directory or a block device, there already or not. With ``daemons_pool`` a
    daemon that runs has named it, and it may be that daemon's alone.
    """

    inventory: Inventory | None
    trouble: str
    pool: Path
    smallest_pool: int
    arena: int
    daemons_pool: bool = False

    @property
    def cards(self) -> tuple[SmartSsd, ...]:
        """The cards that were found."""
        return self.inventory.cards if self.inventory else ()


def ok(detail: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(Verdict.OK, detail)


def warning(detail: str, remedy: str) -> Finding:
    """Return a finding of something that slows or limits."""
    return Finding(Verdict.WARNING, detail, remedy)


def failed(detail: str, remedy: str) -> Finding:
    """Return a finding of something that does not work."""
    return Finding(Verdict.FAILED, detail, remedy)


def not_applicable(detail: str) -> Finding:
    """Return that there is nothing to check."""
    return Finding(Verdict.NOT_APPLICABLE, detail)


def worst(findings: Iterable[Finding]) -> Finding:
    """Return one for several: the gravest verdict, all details, and the remedies of the gravest."""
    every = list(findings)
    verdict = max((finding.verdict for finding in every), key=_GRAVITY.index)
    remedies = dict.fromkeys(
        finding.remedy for finding in every if finding.verdict == verdict and finding.remedy
    )
    return Finding(verdict, "; ".join(finding.detail for finding in every), "; ".join(remedies))


def of_cards(machine: Machine, check: Callable[[SmartSsd], Finding]) -> Finding:
    """Return the finding over all flashed cards, each named by its address; not applicable without one."""
    cards = [card for card in machine.cards if card.fpga.flashed]
    if not cards:
        return not_applicable("no flashed SmartSSD")
    found = [check(card) for card in cards]
    return worst(
        Finding(finding.verdict, f"{card.fpga.address}: {finding.detail}", finding.remedy)
        for card, finding in zip(cards, found, strict=True)
    )
