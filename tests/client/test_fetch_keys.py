"""Evaluation keys in the client: the very ones that the daemon ranks."""

from __future__ import annotations

import numpy as np
import pytest
from kv_rows import as_float32, random_kv, random_query

from hillinfer import DType, EvaluateItem, Precision, PrivateDaemon, Session, Shape
from hillinfer.context import Context
from hillinfer_core import kernel, reference
from hillinfer_core.errors import CorruptData, InvalidInput
from hillinfer_core.layout import Reduction
from hillinfer_core.reference import Ranges
from hillinfer_core.v1 import cold_pool_pb2

TOKENS = 2048


def shape_of(precision: Precision) -> Shape:
    return Shape(2, 2, 64, DType.float16, precision)


@pytest.mark.parametrize("precision", list(Precision))
def test_keys_are_those_of_the_reference_in_sealed_extents_and_others(
    session: Session, precision: Precision
) -> None:
    shape = shape_of(precision)
    keys, values = random_kv(shape, TOKENS)
    ranges = reference.fit_ranges(as_float32(shape, keys), precision)
    tiles = reference.quantise_keys(np.stack([keys, keys], axis=2), ranges, precision)[0]
    with session.open_context(shape) as context:
        context.append(1, keys, values)
        for first, end in [(0, TOKENS), (16, 32), (240, 1040), (TOKENS - 16, TOKENS)]:
            fetched = context.fetch_keys(1, first, end)
            np.testing.assert_array_equal(fetched.tiles, tiles[:, first // 16 : end // 16])
            np.testing.assert_array_equal(fetched.scale, ranges.scale)
            assert fetched.generation == 0


def test_a_small_arena_brings_them_in_pieces(daemon: PrivateDaemon) -> None:
    shape = shape_of(Precision.int8)
    keys, values = random_kv(shape, TOKENS)
    with Session.connect(daemon.socket, arena_bytes=32 << 10) as session:
        context = session.open_context(shape)
        context.append(0, keys, values)
        pieces = [context.fetch_keys(0, first, first + 64).tiles for first in range(0, TOKENS, 64)]
        np.testing.assert_array_equal(context.fetch_keys(0, 0, TOKENS).tiles, np.concatenate(pieces, axis=1))


def test_their_scores_are_the_daemons_and_the_generation_tells_when_not(session: Session) -> None:
    shape = shape_of(Precision.int8)
    keys, values = random_kv(shape, TOKENS)
    query = random_query(4, 64)
    with session.open_context(shape) as context:
        for end in (64, TOKENS):
            start = context.length(0)
            context.append(0, keys[:, start:end], values[:, start:end])
            fetched = context.fetch_keys(0, 0, end)
            nothing = np.empty((2, 0), np.uint32)
            [drive] = session.rank(0, [EvaluateItem(context, query, 32, 0, end, nothing)])
            assert drive.generation == fetched.generation == (0 if end == 64 else 1)
            q, _, _ = kernel.quantise_query(query, Ranges(fetched.scale, fetched.scale), Reduction.sum)
            host = kernel.rank([fetched.tiles], q, shape.precision, 0, end, 32)
            np.testing.assert_array_equal(drive.ids, host.ids)
            np.testing.assert_array_equal(drive.scores, host.scores)
            assert len(drive.rows) == 0


def test_ranges_that_there_are_no_keys_for(session: Session) -> None:
    shape = shape_of(Precision.int4)
    keys, values = random_kv(shape, 300)
    with session.open_context(shape) as context:
        context.append(0, keys, values)
        for first, end in [(0, 0), (8, 32), (0, 24), (0, 304), (32, 16), (-16, 16)]:
            with pytest.raises(InvalidInput):
                context.fetch_keys(0, first, end)
        staging = session.staging()
        staging.reset()
        region, _ = staging.take((1 << 20,), np.uint8)
        for first, end in [(8, 32), (0, 24), (0, 1 << 40), (32, 16)]:
            with pytest.raises(InvalidInput):
                context.fetch_into(
                    0, region, keys=cold_pool_pb2.KeyRange(first_token=first, end_token=end, scales=region)
                )


def test_keys_that_changed_on_their_way_are_refused(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = shape_of(Precision.int8)
    fetch = Context.fetch_into

    def spoiled(self: Context, *args: object, **which: object) -> object:
        answer = fetch(self, *args, **which)
        answer.key_checksums[0] ^= 1
        return answer

    with session.open_context(shape) as context:
        context.append(0, *random_kv(shape, 64))
        monkeypatch.setattr(Context, "fetch_into", spoiled)
        with pytest.raises(CorruptData):
            context.fetch_keys(0, 0, 64)
