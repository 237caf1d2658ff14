"""Large work is cut: into pieces that are all of it, in turns of their own, with the same result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_client import RawClient, Refused, random_rows, wait_for
from service_thread import Served, drive_settings, served

from hillinfer_core.layout import DType, Precision, Reduction, Shape
from hillinfer_core.packed import Item, Region
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinferd.domain.contexts import MAX_APPEND_BYTES
from hillinferd.domain.extents import GRANULE, Extent
from hillinferd.service import pieces, requests
from hillinferd.service.work_queue import Piece, Priority
from hillinferd.worker import messages

SHAPE = Shape(1, 8, 128, DType.float16, Precision.int8)
ROW = SHAPE.row_bytes
TOKENS = 6000 // SHAPE.append_unit * SHAPE.append_unit
NOTHING = Region(0, 0)


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=4), st.sampled_from([128, 512, 8192]))
def test_pieces_of_ids_are_all_of_them_in_their_order(counts: list[int], row_bytes: int) -> None:
    total = sum(counts)
    whole = messages.FetchIds(1, 2, 0, counts, Region(64, total * 4), Region(4096, total * row_bytes))
    cut = pieces.OfIds(whole, row_bytes)
    assert np.sum([piece.count_per_head for piece in cut] or [[0] * len(counts)], axis=0).tolist() == counts
    heads = [head for piece in cut for head, count in enumerate(piece.count_per_head) for _ in range(count)]
    assert heads == sorted(heads)
    ids, rows = 64, 4096
    for piece in cut:
        count = sum(piece.count_per_head)
        assert count > 0
        assert piece.ids == Region(ids, count * 4)
        assert piece.rows == Region(rows, count * row_bytes)
        ids, rows = ids + count * 4, rows + count * row_bytes
    assert rows == 4096 + total * row_bytes


@given(st.integers(1, 50_000), st.integers(0, 1000))
def test_pieces_of_a_range_are_all_of_it(count: int, first: int) -> None:
    cut = pieces.of_range(messages.FetchRange(1, 2, 0, first, count, NOTHING, count), SHAPE)
    assert [
        token for piece in cut for token in range(piece.first_token, piece.first_token + piece.count)
    ] == [*range(first, first + count)]
    assert all(piece.skipped == piece.first_token - first and piece.room == count for piece in cut)


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.integers(1, 1000)), min_size=1, max_size=20))
def test_pieces_of_evaluations_are_all_of_them(sizes: list[tuple[int, int]]) -> None:
    items = [
        Item(7, 0, tokens, k, *[NOTHING] * 4, Region(0, k * 8 * ROW), NOTHING, NOTHING) for tokens, k in sizes
    ]
    whole = messages.Evaluate(1, 0, 8, Reduction.sum, items)
    cut = pieces.of_evaluate(whole, [SHAPE] * len(items))
    assert [item for piece in cut for item in piece.evaluations] == items
    assert all(piece.evaluations for piece in cut)


def test_ids_that_are_held_take_time_and_so_do_passes() -> None:
    held = Region(0, 2 << 20)
    many = [Item(7, 0, 16, 1, *[NOTHING] * 3, held, *[NOTHING] * 3)] * 9
    cut = pieces.of_evaluate(messages.Evaluate(1, 0, 8, Reduction.sum, many), [SHAPE] * 9)
    assert len(cut) == 9
    assert [_pieces(reduction) for reduction in (Reduction.sum, Reduction.max)] == [1, 9]


def _pieces(reduction: Reduction) -> int:
    """How many there are of evaluations that scan little, with 128 query heads for each KV head."""
    items = [Item(7, 0, 2048, 1, *[NOTHING] * 7)] * 9
    return len(pieces.of_evaluate(messages.Evaluate(1, 0, 128 * 8, reduction, items), [SHAPE] * 9))


def test_a_piece_of_very_many_ids_is_made_alone() -> None:
    counts = [1 << 20] * 1024
    cut = pieces.OfIds(messages.FetchIds(1, 2, 0, counts, Region(0, 1 << 32), Region(0, 1 << 35)), 32)
    last = cut[len(cut) - 1]
    assert last.rows.offset + last.rows.length == 1 << 35
    assert last.count_per_head[:-1] == [0] * 1023
    with pytest.raises(IndexError):
        cut[len(cut)]


def test_what_is_small_goes_with_decode() -> None:
    def by_ids(count: int) -> requests.FetchIds:
        return requests.FetchIds(1, 0, [count], requests.RawRegion(), requests.RawRegion(0, count * ROW, 1))

    def run(count: int) -> requests.FetchRange:
        return requests.FetchRange(1, 0, 0, count, requests.RawRegion(0, count * 8 * ROW, 1))

    assert pieces.priority_of(by_ids(1000)) is pieces.priority_of(run(256)) is Priority.decode
    assert pieces.priority_of(by_ids(10_000)) is pieces.priority_of(run(16384)) is Priority.bulk


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=5))
def test_pieces_of_extents_are_all_of_them(granules: list[int]) -> None:
    extents, at = [], 0
    for count in granules:
        extents.append(Extent(at * GRANULE, count * GRANULE))
        at += count + 1
    cut = pieces.of_extents(extents)
    assert all(0 < piece.length <= pieces.DISCARD_BYTES for piece in cut)
    covered = [place for piece in cut for place in range(piece.offset, piece.end, GRANULE)]
    assert covered == [place for each in extents for place in range(each.offset, each.end, GRANULE)]


@pytest.mark.parametrize("how", ["closed", "left"])
def test_a_large_context_is_freed_in_pieces(runtime_dir: Path, how: str) -> None:
    told: list[Piece] = []
    with served(runtime_dir, drive_settings("one", runtime_dir / "pool")) as service:
        service.run(lambda: service.service.observe(lambda _, piece, __: told.append(piece)))
        with RawClient(runtime_dir, 16 << 20) as watcher:
            with RawClient(runtime_dir, 16 << 20) as client:
                context, small = client.open(SHAPE), client.open(SHAPE)
                rows = random_rows(np.random.default_rng(0), SHAPE, 256)
                for first in range(0, 8192, 256):
                    client.append(context, 0, first, rows)
                client.append(small, 0, 0, rows)
                assert client.status().pool.used_bytes > 32 << 20
                told.clear()
                if how == "closed":
                    client.close_context(context)
                    assert client.status().pool.used_bytes < 8 << 20
                    with pytest.raises(Refused, match="not an open context"):
                        client.close_context(context)
                    np.testing.assert_array_equal(client.fetch_range(small, SHAPE, 0, 0, 256), rows)
            wait_for(lambda: watcher.status().pool.used_bytes == 0, 60)
    closing = [piece for piece in told if piece.operation == "close"]
    assert len(closing) >= 4
    assert {piece.priority for piece in closing} == {Priority.bulk}
    assert {piece.error for piece in closing if piece.error} == set()


def operations(service: Served, told: list[Piece]) -> list[tuple[str, Priority | None]]:
    heard = service.run(lambda: [(piece.operation, piece.priority) for piece in told])
    told.clear()
    return heard


def test_large_work_is_cut_and_gives_the_same(runtime_dir: Path) -> None:
    rows = random_rows(np.random.default_rng(0), SHAPE, TOKENS)
    with (
        served(runtime_dir, drive_settings("one", runtime_dir / "pool")) as service,
        RawClient(runtime_dir, 64 << 20) as client,
    ):
        opened = client.open_named(SHAPE)
        assert 0 < opened.append_limit * SHAPE.kv_heads * ROW <= MAX_APPEND_BYTES
        context, limit = opened.context_id, opened.append_limit
        for first in range(0, TOKENS, limit):
            client.append(context, 0, first, rows[:, first : first + limit])
        with pytest.raises(Refused, match=f"at most {limit} tokens"):
            client.append(context, 0, TOKENS, rows[:, : limit + SHAPE.append_unit], whole=True)

        told: list[Piece] = []
        service.run(lambda: service.service.observe(lambda _, piece, __: told.append(piece)))
        np.testing.assert_array_equal(client.fetch_range(context, SHAPE, 0, 0, TOKENS), rows)
        assert operations(service, told) == [("fetch", Priority.bulk)] * 2

        rng = np.random.default_rng(1)
        ids = [rng.choice(TOKENS, 700, replace=False).tolist() for _ in range(SHAPE.kv_heads)]
        expected = np.concatenate([rows[head, tokens] for head, tokens in enumerate(ids)])
        np.testing.assert_array_equal(client.fetch_ids(context, SHAPE, 0, ids), expected)
        assert operations(service, told) == [("fetch", Priority.bulk)] * 2

        results = evaluate_twice(client, context, rng.standard_normal((2, 8, 128)).astype(np.float32))
        assert operations(service, told) == [("evaluate", Priority.decode)] * 2
        for ids_found, rows_found in results:
            expected = np.concatenate([rows[head, ids_found[head]] for head in range(SHAPE.kv_heads)])
            np.testing.assert_array_equal(rows_found, expected)
        assert not np.array_equal(results[0][0], results[1][0])


def evaluate_twice(
    client: RawClient, context: int, queries: np.ndarray, k: int = 400
) -> list[tuple[np.ndarray, np.ndarray]]:
    client.reset()
    items, views = [], []
    for query in queries:
        query_region, query_view = client.take(query.shape, np.float32)
        query_view[...] = query
        ids_region, ids = client.take((SHAPE.kv_heads, k), np.uint32)
        rows_region, rows = client.take((SHAPE.kv_heads * k, 2, SHAPE.head_dim), np.float16)
        views.append((ids, rows))
        items.append(
            pb.Evaluation(
                context_id=context,
                first_token=0,
                end_token=TOKENS,
                k=k,
                query=query_region,
                ids=ids_region,
                rows=rows_region,
            )
        )
    request = pb.EvaluateRequest(layer=0, query_heads=8, reduction=1, evaluations=items)
    response = client.call("Evaluate", request)
    assert [result.rows_brought for result in response.results] == [SHAPE.kv_heads * k] * 2
    return [(ids.copy(), rows.copy()) for ids, rows in views]
