"""Evaluation keys that a card does not take: they are in the pool, and nothing of an append is lost."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
from xrt_rig import opened

from hillinfer_core.arena import Arena, create_arena
from hillinfer_core.layout import DType, Precision, Shape
from hillinferd.domain.contexts import Catalogue, Context, Quotas
from hillinferd.domain.extents import GRANULE, ExtentAllocator
from hillinferd.domain.regions import Region
from hillinferd.worker import messages
from hillinferd.worker.operations import Operations

POOL = 8 << 20
SHAPE = Shape(1, 1, 64, DType.float16, Precision.int4)


def test_an_append_whose_keys_cannot_be_copied_to_the_card_is_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # pytest keeps what is logged, and the error holds the card's memory
    with opened(tmp_path, {"capacity": POOL}, p2p=False) as driver:
        operations, seeds = Operations(driver), itertools.count()
        catalogue = Catalogue(ExtentAllocator(POOL, GRANULE), Quotas())
        memory = create_arena(POOL, "keys")
        arena = Arena(memory, POOL)
        operations.carry_out(messages.AttachArena(1, POOL), memory)

        def begun() -> Context:
            context = catalogue.open(1, 1000, SHAPE)
            operations.carry_out(messages.OpenContext(context.context_id, SHAPE), None)
            return context

        def append(context: Context, tokens: int) -> np.ndarray:
            rows = np.random.default_rng(next(seeds)).standard_normal((1, tokens, 2, 64)).astype(np.float16)
            arena.view(0, rows.shape, np.float16)[:] = rows
            placed, first = (
                catalogue.reserve(context, 0, context.layers[0].tokens, tokens),
                context.layers[0].tokens,
            )
            where = Region(0, rows.nbytes)
            done = operations.carry_out(
                messages.Append(1, context.context_id, 0, first, tokens, where, placed), None
            )
            assert isinstance(done, messages.Done), done
            catalogue.commit(context, 0, tokens, placed)
            return rows

        def held(context: Context, tokens: int) -> np.ndarray:
            rows = arena.view(0, (1, tokens, 2, 64), np.float16)
            asked = messages.FetchRange(1, context.context_id, 0, 0, tokens, Region(0, rows.nbytes), tokens)
            assert isinstance(operations.carry_out(asked, None), messages.Done)
            return rows.copy()

        one, other = begun(), begun()
        driver.fake.sync_error = True
        first = append(one, 256)  # the first extent is full, and its keys go to the card
        driver.fake.sync_error = False
        of_other, more = append(other, 128), append(one, 128)
        np.testing.assert_array_equal(held(one, 384), np.concatenate([first, more], axis=1))
        np.testing.assert_array_equal(held(other, 128), of_other)
        for context in (one, other):
            operations.carry_out(messages.DropContext(context.context_id), None)
