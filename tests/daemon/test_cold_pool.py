"""Append, evaluate and fetch over the real sockets, held to the definition in hillinfer_core.reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from raw_client import CALL_S, RawClient, random_rows, wait_for

from hillinfer_core import reference
from hillinfer_core.layout import DType, Precision, Reduction, Shape
from hillinferd.domain.extents import GRANULE
from hillinferd.domain.placement import extent_bytes

SHAPE = Shape(2, 2, 64, DType.float16, Precision.int4)
EXTENT_BYTES = sum(-(-extent_bytes(SHAPE, 256) // GRANULE) * GRANULE for _ in range(2))
"""Of one layer with 257 to 512 tokens: two extents of 256."""


def expected(
    rows: np.ndarray, ranges: reference.Ranges, shape: Shape, query: np.ndarray, reduction: Reduction
) -> np.ndarray:
    tiles, _, _ = reference.quantise_keys(rows, ranges, shape.precision)
    q, offsets, _ = reference.quantise_query(query, ranges, reduction)
    out = np.zeros((shape.kv_heads, tiles.shape[1] * 16), np.int32)
    reference.scores(tiles, q, shape.precision, out, offsets=offsets)
    return out[:, : rows.shape[1]]


def fit(rows: np.ndarray, shape: Shape) -> reference.Ranges:
    return reference.fit_ranges(reference.widen_keys(rows), shape.precision)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 8), (2, 64), (3, 24)])
def test_rows_come_back_and_ranking_is_the_reference(
    client: RawClient, dtype: DType, precision: Precision, kv_heads: int, head_dim: int
) -> None:
    shape = Shape(1, kv_heads, head_dim, dtype, precision)
    rng = np.random.default_rng(head_dim)
    context = client.open(shape)
    rows = random_rows(rng, shape, 1024 + shape.append_unit)
    client.append(context, 0, 0, rows[:, :1024])
    response = client.append(context, 0, 1024, rows[:, 1024:])
    tokens = rows.shape[1]
    assert response.layer_tokens == tokens
    assert response.checksum_bytes == tokens * kv_heads * 4
    assert response.evaluation_key_bytes == tokens * kv_heads * head_dim * precision.bits // 8

    np.testing.assert_array_equal(client.fetch_range(context, shape, 0, 0, tokens), rows)
    np.testing.assert_array_equal(client.fetch_range(context, shape, 0, 1000, 33), rows[:, 1000:1033])
    ids = [[int(token) for token in rng.integers(0, tokens, 5 + head)] for head in range(kv_heads)]
    wanted = np.concatenate([rows[head, ids[head]] for head in range(kv_heads)])
    np.testing.assert_array_equal(client.fetch_ids(context, shape, 0, ids), wanted)

    ranges = fit(rows[:, :1024], shape)
    query = rng.standard_normal((kv_heads * 2, head_dim)).astype(np.float32)
    for reduction in (Reduction.sum, Reduction.max):
        scores = expected(rows, ranges, shape, query, reduction)
        for first, end, k in ((0, tokens, 7), (17, tokens - 3, 100), (250, 300, 50), (5, 6, 1)):
            got_ids, got_scores, _, result = client.evaluate(
                context, shape, 0, query, k, first, end, reduction=reduction
            )
            want_ids, want_scores = reference.top_k(scores[:, first:end], k, first)
            np.testing.assert_array_equal(got_ids, want_ids)
            np.testing.assert_array_equal(got_scores, want_scores)
            assert result.generation == 0
            assert result.scan_s > 0
            assert result.evaluated_bytes >= (end - first) * kv_heads * head_dim * precision.bits // 8


def test_only_missing_winners_are_brought_and_only_as_many_as_fit(client: RawClient) -> None:
    rng = np.random.default_rng(1)
    context = client.open(SHAPE)
    rows = random_rows(rng, SHAPE, 2048)
    client.append(context, 1, 0, rows)
    query = rng.standard_normal((4, 64)).astype(np.float32)
    ids, _, _, _ = client.evaluate(context, SHAPE, 1, query, 60, 0, 2048)
    held = np.full((2, 40), 0xFFFFFFFF, np.uint32)
    held[0, :25] = ids[0, ::-1][:25]
    held[1, :10] = ids[1, 5:15]
    missing = [sorted(set(ids[head].tolist()) - set(held[head].tolist())) for head in range(2)]
    wanted = np.concatenate([rows[head, missing[head]] for head in range(2)])
    for room in (200, 85, 50, 3):
        again, _, brought, result = client.evaluate(
            context, SHAPE, 1, query, 60, 0, 2048, held=held, room=room
        )
        np.testing.assert_array_equal(again, ids)
        assert list(result.missing_per_head) == [35, 50]
        assert result.rows_brought == min(room, 85)
        np.testing.assert_array_equal(brought, wanted[: result.rows_brought])
        assert result.read_bytes >= len(brought) * SHAPE.row_bytes
    _, _, brought, result = client.evaluate(context, SHAPE, 1, query, 60, 0, 2048, held=held)
    assert result.rows_brought == result.read_bytes == 0
    assert list(result.missing_per_head) == [35, 50]


@pytest.mark.parametrize("precision", list(Precision))
def test_a_small_first_append_is_fitted_again_at_1024_tokens(client: RawClient, precision: Precision) -> None:
    shape = Shape(1, 2, 64, DType.float16, precision)
    rng = np.random.default_rng(2)
    rows = random_rows(rng, shape, 1200)
    # The first tokens span what is to come, but for one key that is too few to matter before.
    rows[:, 0], rows[:, 1] = 6, -6
    rows[1, 700, 0, 9] = 40
    context = client.open(shape)
    query = rng.standard_normal((2, 64)).astype(np.float32)
    first = 0
    for count, generation, fitted in ((64, 0, 64), (512, 0, 64), (512, 1, 1088), (112, 1, 1088)):
        client.append(context, 0, first, rows[:, first : first + count])
        first += count
        ids, scores, _, result = client.evaluate(context, shape, 0, query, 16, 0, first)
        assert result.generation == generation
        want = expected(rows[:, :first], fit(rows[:, :fitted], shape), shape, query, Reduction.sum)
        want_ids, want_scores = reference.top_k(want, 16, 0)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_array_equal(scores, want_scores)


def test_keys_that_outgrow_their_ranges_are_quantised_again(client: RawClient) -> None:
    shape = Shape(1, 1, 64, DType.float32, Precision.int8)
    rng = np.random.default_rng(3)
    rows = random_rows(rng, shape, 2048)
    rows[:, 1536:] *= 5
    context = client.open(shape)
    client.append(context, 0, 0, rows[:, :1024])
    client.append(context, 0, 1024, rows[:, 1024:1536])
    query = rng.standard_normal((1, 64)).astype(np.float32)
    assert client.evaluate(context, shape, 0, query, 1, 0, 1536)[3].generation == 0
    client.append(context, 0, 1536, rows[:, 1536:])
    ids, scores, _, result = client.evaluate(context, shape, 0, query, 40, 0, 2048)
    assert result.generation == 1
    want = expected(rows, fit(rows, shape), shape, query, Reduction.sum)
    np.testing.assert_array_equal(ids, reference.top_k(want, 40, 0)[0])
    np.testing.assert_array_equal(scores, reference.top_k(want, 40, 0)[1])


def test_a_long_layer_spans_extents_of_every_size(daemon: Path) -> None:
    rng = np.random.default_rng(4)
    rows = random_rows(rng, SHAPE, 10_000)
    with RawClient(daemon, 16 << 20) as client:
        context = client.open(SHAPE)
        first = 0
        for count in (16, 240, 16, 1008, 2048, 960, 2048, 2048, 1616):
            client.append(context, 0, first, rows[:, first : first + count])
            first += count
        np.testing.assert_array_equal(client.fetch_range(context, SHAPE, 0, 0, 10_000), rows)
        query = rng.standard_normal((2, 64)).astype(np.float32)
        ids, _, brought, _ = client.evaluate(context, SHAPE, 0, query, 300, 100, 9_999, room=600)
        np.testing.assert_array_equal(brought, np.concatenate([rows[head, ids[head]] for head in range(2)]))


def test_several_contexts_in_one_request_and_two_sessions_do_not_meet(daemon: Path) -> None:
    rng = np.random.default_rng(5)
    with RawClient(daemon) as one, RawClient(daemon) as two:
        for client in (one, two):
            for context in (client.open(SHAPE), client.open(SHAPE)):
                rows = random_rows(rng, SHAPE, 512)
                client.append(context, 0, 0, rows)
                np.testing.assert_array_equal(client.fetch_range(context, SHAPE, 0, 0, 512), rows)
        books = {session.session_id: session for session in one.status().sessions}
        for client in (one, two):
            session = books[client.accepted.session_id]
            assert [context.tokens for context in session.contexts] == [512, 512]
            assert {context.extent_bytes for context in session.contexts} == {EXTENT_BYTES}


def test_closing_a_context_frees_its_extents_and_forgets_it(client: RawClient) -> None:
    # What sessions of other tests held is freed after them.
    wait_for(lambda: client.status().pool.used_bytes == 0, CALL_S)
    before = client.status()
    context = client.open(SHAPE)
    client.append(context, 0, 0, random_rows(np.random.default_rng(6), SHAPE, 512))
    during = client.status()
    assert during.pool.used_bytes > before.pool.used_bytes
    assert during.device.evaluation_key_bytes > before.device.evaluation_key_bytes
    client.call("CloseContext", close(context))
    after = client.status()
    assert after.pool == before.pool
    assert after.device.evaluation_key_bytes == before.device.evaluation_key_bytes


def close(context: int) -> object:
    from hillinfer_core.v1.cold_pool_pb2 import CloseContextRequest

    return CloseContextRequest(context_id=context)
