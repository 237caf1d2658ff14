"""cocotb: dot_lanes against hillinfer_core.reference on the shared vectors. simulate.py starts it.

Every tile of a case goes in without gaps, and then again with gaps of idle cycles that carry garbage.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge

from hillinfer_core import reference

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "vectors"))
import evaluation_vectors
from evaluation_vectors import Case

KEY_BITS = int(os.environ["HILLINFER_KEY_BITS"])
QUERY_BITS = int(os.environ["HILLINFER_QUERY_BITS"])
LANES = int(os.environ["HILLINFER_LANES"])
MAX_TILES = 12  # of a case: a simulated cycle costs about 100 us
IDLE = {"gapless": 0.0, "gaps": 0.4}


def chosen() -> list[Case]:
    """Return the shared cases of this precision that are small enough."""
    return [
        case
        for case in evaluation_vectors.cases()
        if case.precision.bits == KEY_BITS
        and case.q.itemsize * 8 == QUERY_BITS
        and case.tiles.shape[1] <= MAX_TILES
    ]


async def collect(dut: Any, found: list[int]) -> None:
    """Append the scores of every tile to ``found``, lane by lane."""
    while True:
        await FallingEdge(dut.clk)
        if int(dut.done.value):
            word = int(dut.scores.value)
            found += np.frombuffer(word.to_bytes(LANES * 4, "little"), "<i4").tolist()


async def feed(dut: Any, tiles: Any, q: Any, rng: random.Random, idle: float) -> None:
    """Drive the beats of ``tiles`` uint8 [T, beats, LANES * 4] with the query ``q`` [D]."""
    step = 32 // KEY_BITS
    slices = q.reshape(-1, step).astype(q.dtype.newbyteorder("<"))
    for tile in tiles:
        for number, beat in enumerate(tile):
            while rng.random() < idle:
                dut.valid.value = 0
                dut.first.value, dut.last.value = rng.getrandbits(1), rng.getrandbits(1)
                dut.beat.value = rng.getrandbits(LANES * 32)
                await FallingEdge(dut.clk)
            dut.valid.value = 1
            dut.first.value, dut.last.value = number == 0, number == len(tile) - 1
            dut.beat.value = int.from_bytes(beat.tobytes(), "little")
            dut.query.value = int.from_bytes(slices[number].tobytes(), "little")
            await FallingEdge(dut.clk)
    dut.valid.value = 0


@cocotb.test()
async def agrees_with_the_reference(dut: Any) -> None:
    """Compare every score, of every query vector on its own, in order."""
    rng = random.Random(7)
    cocotb.start_soon(Clock(dut.clk, 2, "ns").start())
    dut.reset.value, dut.valid.value = 1, 0
    dut.first.value = dut.last.value = dut.beat.value = dut.query.value = 0
    for _ in range(8):
        await FallingEdge(dut.clk)
    dut.reset.value = 0
    found: list[int] = []
    cocotb.start_soon(collect(dut, found))
    compared = 0
    cases = chosen()
    assert cases
    for case in cases:
        beats = case.tiles.reshape(*case.tiles.shape[:2], -1, 64)[..., : LANES * 4]
        for idle in IDLE.values():
            for head in range(case.q.shape[0]):
                for vector in range(min(case.q.shape[1], 2)):
                    alone = np.empty((1, case.tiles.shape[1] * 16), np.int32)
                    keys = case.tiles[head % len(case.tiles)][None]
                    reference.scores(keys, case.q[head, vector][None, None], case.precision, alone)
                    expected = alone.reshape(-1, 16)[:, :LANES].reshape(-1).tolist()
                    found.clear()
                    await feed(dut, beats[head % len(case.tiles)], case.q[head, vector], rng, idle)
                    for _ in range(8):
                        await FallingEdge(dut.clk)
                    assert found == expected, case.name
                    compared += len(expected)
    dut._log.info("%d scores of %d cases agree with hillinfer_core.reference", compared, len(cases))
