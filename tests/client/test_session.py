"""Session and Context against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from kv_rows import expected_selection, random_kv, random_query

from hillinfer import DType, EvaluateItem, Precision, PrivateDaemon, Reduction, Session, Shape
from hillinfer.evaluation import EMPTY

SHAPE = Shape(layers=2, kv_heads=2, head_dim=64, dtype=DType.float16, precision=Precision.int8)
TOKENS = 2048


def by_head(array: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.take_along_axis(array, ids[:, :, None].astype(np.int64), axis=1)


@pytest.mark.parametrize("dtype", list(DType))
def test_rows_come_back_as_they_went_whatever_the_pieces_of_append(session: Session, dtype: DType) -> None:
    shape = Shape(2, 3, 32, dtype, Precision.int4)
    keys, values = random_kv(shape, 301)
    with session.open_context(shape) as context:
        for start, end in [(0, 1), (1, 100), (100, 100), (100, 131), (131, 300), (300, 301)]:
            context.append(1, keys[:, start:end], values[:, start:end])
            assert context.length(1) == end
            assert context.flushed(1) == end // context.append_unit * context.append_unit
        assert context.length(0) == 0
        assert 0 < context.flushed(1) < 301

        ids = np.random.default_rng(2).integers(0, 301, (3, 200), dtype=np.uint32)
        fetched_keys, fetched_values = context.fetch(1, ids)
        np.testing.assert_array_equal(fetched_keys, by_head(keys, ids))
        np.testing.assert_array_equal(fetched_values, by_head(values, ids))

        lists = [np.array([300, 0], np.uint32), np.array([], np.uint32), np.array([5, 5, 299], np.uint32)]
        key_list, value_list = context.fetch(1, lists)
        for head, wanted in enumerate(lists):
            np.testing.assert_array_equal(key_list[head], keys[head, wanted])
            np.testing.assert_array_equal(value_list[head], values[head, wanted])

        for first, count in [(0, 301), (7, 100), (299, 2), (301, 0), (100, 0)]:
            rows = context.fetch_range(1, first, count)
            np.testing.assert_array_equal(rows[:, :, 0], keys[:, first : first + count])
            np.testing.assert_array_equal(rows[:, :, 1], values[:, first : first + count])


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("reduction", [Reduction.sum, Reduction.max])
def test_ranking_is_the_reference_to_the_bit(
    session: Session, precision: Precision, reduction: Reduction
) -> None:
    shape = Shape(1, 2, 64, DType.bfloat16, precision)
    keys, values = random_kv(shape, TOKENS)
    query = random_query(6, 64)
    with session.open_context(shape) as context:
        context.append(0, keys, values)
        for first, end, k in [(0, TOKENS, 41), (4, 1999, 1), (17, 30, 13)]:
            selection = context.evaluate(0, query, k, first=first, end=end, reduction=reduction)
            ids, scores = expected_selection(shape, keys, query, k, first, end, reduction)
            np.testing.assert_array_equal(selection.ids, ids)
            np.testing.assert_array_equal(selection.scores, scores)
            assert selection.evaluated_bytes > 0


def test_winners_that_are_not_held_are_brought(session: Session) -> None:
    query, k = random_query(4, 64), 100
    keys, values = random_kv(SHAPE, TOKENS)
    with session.open_context(SHAPE) as first, session.open_context(SHAPE) as second:
        first.append(1, keys, values)
        second.append(1, values, keys)
        expected, _ = expected_selection(SHAPE, keys, query, k, 4, TOKENS)
        other, _ = expected_selection(SHAPE, values, -query, k, 0, 1000)
        held = np.full((2, 64), EMPTY, np.uint32)
        held[0, :50] = expected[0, ::2]
        held[0, 50:] = 3
        held[1, 3] = expected[1, 7]
        nothing = np.empty((2, 0), np.uint32)
        items = [
            EvaluateItem(first, query, k, 4, TOKENS, held),
            EvaluateItem(second, -query, k, 0, 1000, nothing),
        ]
        for _ in range(3):
            one, two = session.evaluate_and_bring(1, items)
            np.testing.assert_array_equal(one.ids, expected)
            np.testing.assert_array_equal(two.ids, other)
            assert one.missing_per_head == [50, 99]
            assert two.missing_per_head == [100, 100]
            missing = np.delete(expected[1], 7)
            np.testing.assert_array_equal(one.rows[:50, 0], keys[0, expected[0, 1::2]])
            np.testing.assert_array_equal(one.rows[:50, 1], values[0, expected[0, 1::2]])
            np.testing.assert_array_equal(one.rows[50:, 0], keys[1, missing])
            np.testing.assert_array_equal(two.rows[100:, 1], keys[1, other[1]])
            assert one.read_bytes >= one.rows.nbytes


def test_an_arena_smaller_than_the_request_works_in_pieces(daemon: PrivateDaemon) -> None:
    keys, values = random_kv(SHAPE, TOKENS + 5)
    query, k = random_query(4, 64), 300
    with Session.connect(daemon.socket, arena_bytes=32 << 10) as session:
        context = session.open_context(SHAPE)
        twin = session.open_context(SHAPE)
        for opened in (context, twin):
            opened.append(0, keys, values)
        np.testing.assert_array_equal(context.fetch_range(0, 0, TOKENS + 5)[:, :, 1], values)
        ids = np.random.default_rng(3).integers(0, TOKENS + 5, (2, 1000), dtype=np.uint32)
        np.testing.assert_array_equal(context.fetch(0, ids)[0], by_head(keys, ids))

        winners = context.evaluate(0, query, k).ids
        held = np.empty((2, 0), np.uint32)
        items = [EvaluateItem(each, query, k, 0, TOKENS, held) for each in (context, twin) * 8]
        for brought in session.evaluate_and_bring(0, items):
            np.testing.assert_array_equal(brought.ids, winners)
            np.testing.assert_array_equal(brought.rows[:, 0], by_head(keys, winners).reshape(-1, 64))
            assert brought.read_bytes >= brought.rows.nbytes


def test_what_is_counted(session: Session) -> None:
    keys, values = random_kv(SHAPE, 64)
    with session.open_context(SHAPE) as context:
        context.append(0, keys, values)
        assert session.counters.written_bytes == 64 * 2 * SHAPE.row_bytes
        assert context.evaluation_key_bytes >= 64 * 2 * 64
        assert context.checksum_bytes >= 64 * 2 * 4
        read = session.counters.read_bytes
        context.fetch_range(0, 0, 64)
        assert session.counters.read_bytes - read >= 64 * 2 * SHAPE.row_bytes
        selection = context.evaluate(0, random_query(2, 64), 5)
        assert session.counters.evaluated_bytes == selection.evaluated_bytes


def test_status_shows_what_a_session_holds_and_closing_frees_it(daemon: PrivateDaemon) -> None:
    with Session.connect(daemon.socket, arena_bytes=0, name="onlooker") as onlooker:
        used = onlooker.status().pool.used_bytes
        with Session.connect(daemon.socket, name="holder") as holder:
            context = holder.open_context(SHAPE)
            context.append(0, *random_kv(SHAPE, 1024))
            [seen] = [each for each in onlooker.status().sessions if each.client_name == "holder"]
            assert [each.tokens for each in seen.contexts] == [1024]
            assert seen.session_id == holder.session_id
            assert onlooker.status().pool.used_bytes > used
            context.close()
            assert onlooker.status().pool.used_bytes == used
