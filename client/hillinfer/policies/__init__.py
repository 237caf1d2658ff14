"""Policies to compare HillInfer with, by name; one small file each, which names its source."""

from __future__ import annotations

from hillinfer.policies.abstracts import Abstracts
from hillinfer.policies.base import Comparison
from hillinfer.policies.full import Full
from hillinfer.policies.h2o import H2O
from hillinfer.policies.next_layer import NextLayer
from hillinfer.policies.oracle import Oracle
from hillinfer.policies.previous_step import PreviousStep
from hillinfer.policies.quest import Quest
from hillinfer.policies.ranking import Ranking
from hillinfer.policies.recent import Recent

POLICIES: dict[str, type[Comparison]] = {
    each.name: each
    for each in (Full, Ranking, Recent, H2O, Quest, Abstracts, NextLayer, PreviousStep, Oracle)
}
