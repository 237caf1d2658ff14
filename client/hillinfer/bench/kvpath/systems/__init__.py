"""The systems by name; one small file each, which names what it follows."""

from __future__ import annotations

from hillinfer.bench.kvpath.systems.base import System
from hillinfer.bench.kvpath.systems.blocks import KeyAbstracts, PreviousStepBlocks
from hillinfer.bench.kvpath.systems.host_scoring import HostScoring, HostScoringHeld
from hillinfer.bench.kvpath.systems.host_scoring_int4 import HostRanking, HostScoringInt4, NoCsd
from hillinfer.bench.kvpath.systems.ranking import HillInfer, HkmOnly
from hillinfer.bench.kvpath.systems.reload import Reload, ReloadHeld

SYSTEMS: dict[str, type[System]] = {
    each.name: each
    for each in (
        HillInfer,
        HkmOnly,
        HostRanking,
        NoCsd,
        HostScoringInt4,
        HostScoring,
        HostScoringHeld,
        KeyAbstracts,
        PreviousStepBlocks,
        Reload,
        ReloadHeld,
    )
}
