"""Ranking for each query head apart: its scores bound every product, also those of clipped keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_rows import as_float32, random_kv, random_query

from hillinfer import DType, EvaluateItem, Precision, PrivateDaemon, Reduction, Session, Shape
from hillinfer.apart import Apart, ApartItem
from hillinfer.context import Context
from hillinfer.evaluation import EMPTY
from hillinfer_core.errors import InvalidInput

HEADS, GROUP, DIM = 2, 3, 32


def products(keys: np.ndarray, query: np.ndarray) -> np.ndarray:
    each = np.repeat(keys, len(query) // len(keys), axis=0).astype(np.float64)
    return np.einsum("rd,rnd->rn", query.astype(np.float64), each)


def ask(context: Context, query: np.ndarray, k: int, first: int, end: int) -> Apart:
    return context.session.rank_apart(0, [ApartItem(context, query, k, first, end)])[0]


def check(context: Context, keys: np.ndarray, query: np.ndarray, first: int, end: int) -> None:
    """The bound holds for every token, and winners and histogram are those of the scores."""
    whole = ask(context, query, end - first, first, end)
    np.testing.assert_array_equal(whole.ids, np.tile(np.arange(first, end), (len(query), 1)))
    scale = whole.scale
    upper = np.where(whole.scores >= scale.low[:, None] + 2048 * scale.width[:, None], np.inf, whole.scores)
    upper = np.minimum(upper, scale.ceiling[:, None]) * scale.sigma[:, None] + scale.offset[:, None]
    exact = products(keys[:, first:end], query)
    assert (exact <= upper + scale.error[:, None]).all()
    bins = np.clip((whole.scores - scale.low[:, None]) // scale.width[:, None], 0, 2047).astype(int)
    for row, counts in enumerate(whole.histogram):
        np.testing.assert_array_equal(counts, np.bincount(bins[row], minlength=2048))

    k = max(1, (end - first) // 7)
    best = ask(context, query, k, first, end)
    np.testing.assert_array_equal(best.histogram, whole.histogram)
    for row in range(len(query)):
        order = np.argsort(-whole.scores[row].astype(np.int64), kind="stable")[:k]
        np.testing.assert_array_equal(best.ids[row], np.sort(order) + first)
        np.testing.assert_array_equal(best.scores[row], whole.scores[row][np.sort(order)])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 2**32),
    st.sampled_from(DType),
    st.sampled_from(Precision),
    st.floats(1, 200),
    st.floats(-4, 4),
)
def test_every_product_is_bounded_also_of_outliers_that_come_later(
    session: Session, seed: int, dtype: DType, precision: Precision, reach: float, power: float
) -> None:
    shape = Shape(1, HEADS, DIM, dtype, precision)
    rng = np.random.default_rng(seed)
    first, unit = 1024, shape.append_unit
    later = unit * int(rng.integers(1, 4))
    keys, values = random_kv(shape, first + later, seed)
    # Few elements, so that the layer is not quantised again; far outside, so that a bound would break.
    wild = rng.random((HEADS, later, DIM)) < 0.005
    wide = as_float32(shape, keys[:, first:]) * np.where(wild, reach, 1).astype(np.float32)
    keys[:, first:] = (
        (np.ascontiguousarray(wide).view(np.uint32) >> 16).astype(np.uint16)
        if dtype is DType.bfloat16
        else wide.astype(keys.dtype)
    )
    keys[:, :, 3] = keys[0, 0, 3]
    query = random_query(HEADS * GROUP, DIM, seed) * np.float32(10.0**power)
    query[1] = -query[0]
    with session.open_context(shape) as context:
        context.append(0, keys[:, :first], values[:, :first])
        context.append(0, keys[:, first:], values[:, first:])
        check(context, as_float32(shape, keys), query, int(rng.integers(0, 40)), first + later)


def test_clipped_keys_are_found_again_after_ranges_change_and_in_what_begins_with_a_saved_context(
    tmp_path: Path,
) -> None:
    shape = Shape(1, HEADS, DIM, DType.float16, Precision.int8)
    keys, values = random_kv(shape, 2560)
    keys[:, 1024:1056, ::5] *= 9
    query = random_query(HEADS * GROUP, DIM)
    with (
        PrivateDaemon(pool_capacity=64 << 20, pool_dir=tmp_path) as daemon,
        Session.connect(daemon.socket, name="test", timeout_s=20) as session,
    ):
        context = session.open_context(shape, durable="outliers")
        context.append(0, keys[:, :1024], values[:, :1024])
        context.append(0, keys[:, 1024:1056], values[:, 1024:1056])
        check(context, keys, query, 0, 1056)
        # So many more are outside that the layer is quantised again.
        keys[:, 1056:2048] *= 3
        context.append(0, keys[:, 1056:2048], values[:, 1056:2048])
        check(context, keys, query, 0, 2048)
        keys[:, 2048:2304, ::7] *= 5
        context.append(0, keys[:, 2048:2304], values[:, 2048:2304])
        context.save()
        context.close()
        with session.open_context(shape, base="outliers") as context:
            check(context, keys, query, 0, 2304)
            keys[:, 2304:] *= 20
            context.append(0, keys[:, 2304:], values[:, 2304:])
            check(context, keys, query, 5, 2560)


def test_the_last_bin_has_no_top_when_outliers_exceed_every_score(session: Session) -> None:
    shape = Shape(1, 1, 8, DType.float32, Precision.int8)
    keys, values = random_kv(shape, 1024 + shape.append_unit)
    keys[:, 1024:] = 0
    keys[0, 1030, 0] = 1e30
    query = np.zeros((1, 8), np.float32)
    query[0, 0] = 1
    with session.open_context(shape) as context:
        context.append(0, keys[:, :1024], values[:, :1024])
        context.append(0, keys[:, 1024:], values[:, 1024:])
        found = ask(context, query, 3, 0, keys.shape[1])
        assert 1030 in found.ids[0]
        assert found.scores[0].max() == 2**31 - 1
        assert found.scale.ceiling[0] * found.scale.sigma[0] > 1e29
        check(context, keys, query, 0, keys.shape[1])


def test_what_does_not_fit_together_is_refused(session: Session) -> None:
    shape = Shape(1, HEADS, DIM, DType.float16, Precision.int8)
    keys, values = random_kv(shape, 1024)
    query = random_query(HEADS * GROUP, DIM)
    with session.open_context(shape) as context:
        context.append(0, keys, values)
        for k, end in ((0, 1024), (1025, 1024), (10, 1025)):
            with pytest.raises(InvalidInput):
                ask(context, query, k, 0, end)
        with pytest.raises(InvalidInput):
            ask(context, query[:, :-1], 5, 0, 1024)
        with pytest.raises(InvalidInput):
            ask(context, np.full_like(query, np.nan), 5, 0, 1024)
        # Rows, a histogram and scales belong to one kind of evaluation only.
        held = np.full((HEADS, 4), EMPTY, np.uint32)
        with pytest.raises(InvalidInput, match="fetch them by id"):
            session.evaluate_and_bring(
                0, [EvaluateItem(context, query, 5, 0, 1024, held)], reduction=Reduction.none
            )
        with pytest.raises(InvalidInput):
            context.evaluate(0, query, 5, reduction=Reduction.none)
        ask(context, query, 5, 0, 1024)


def test_items_that_do_not_fit_the_arena_together_are_asked_in_turns(daemon: PrivateDaemon) -> None:
    shape = Shape(1, HEADS, DIM, DType.float16, Precision.int8)
    keys, values = random_kv(shape, 1024)
    query = random_query(HEADS * GROUP, DIM)
    with Session.connect(daemon.socket, name="test", timeout_s=20, arena_bytes=160 << 10) as session:
        contexts = [session.open_context(shape) for _ in range(3)]
        for context in contexts:
            context.append(0, keys, values)
        items = [ApartItem(context, query, 900 + i, 0, 1024) for i, context in enumerate(contexts)]
        for item, found in zip(items, session.rank_apart(0, items), strict=True):
            np.testing.assert_array_equal(found.ids, ask(item.context, query, item.k, 0, 1024).ids)
