"""Asking the daemon to rank for each query head apart, which bounds attention mass (docs/guarantee.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hillinfer.evaluation import check_query
from hillinfer.wire import ArenaTooSmall, Staging, number
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Reduction
from hillinfer_core.mass import ScoreScale
from hillinfer_core.reference import HISTOGRAM_BINS
from hillinfer_core.v1 import cold_pool_pb2

if TYPE_CHECKING:
    from hillinfer.context import Context
    from hillinfer.session import Session


class ApartItem(NamedTuple):
    """One context's part of such a ranking of one layer."""

    context: Context
    query: npt.NDArray[np.float32]
    """float32 [query_heads, head_dim], after RoPE, not scaled; query_heads a multiple of kv_heads."""
    k: int
    """Winners per query head; at most `end - first`."""
    first: int
    """First token to rank."""
    end: int
    """One past the last token to rank; at most the tokens flushed."""


@dataclass(frozen=True, slots=True)
class Apart:
    """How the tokens of an `ApartItem` rank for each query head."""

    ids: npt.NDArray[np.uint32]
    """uint32 [query_heads, k]: the best, ascending in each head."""
    scores: npt.NDArray[np.int32]
    """int32 [query_heads, k], of the same order."""
    histogram: npt.NDArray[np.uint32]
    """uint32 [query_heads, 2048]: the scores of all tokens ranked, counted in bins."""
    scale: ScoreScale
    """What scores and bins mean, for each query head."""


def stage(
    staging: Staging, layer: int, items: Sequence[ApartItem]
) -> tuple[cold_pool_pb2.EvaluateRequest, list[tuple[npt.NDArray[Any], ...]]]:
    """Lay a request out in the arena; returns it and, for each item, where its answer will be.

    Raises `InvalidInput` for wrong shapes, `ArenaTooSmall`.
    """
    query_heads = items[0].query.shape[0] if items[0].query.ndim else 0
    request = cold_pool_pb2.EvaluateRequest(
        layer=layer, query_heads=query_heads, reduction=number(Reduction.none)
    )
    staging.reset()
    answers: list[tuple[npt.NDArray[Any], ...]] = []
    for item in items:
        shape = item.context.shape
        check_query(item.query, shape.kv_heads, shape.head_dim, query_heads)
        if not 1 <= item.k <= item.end - item.first:
            raise InvalidInput(f"k must be 1 to {item.end - item.first}, the tokens to rank, not {item.k}")
        query_region, query = staging.take(item.query.shape, np.float32)
        query[...] = item.query
        ids, ids_out = staging.take((query_heads, item.k), np.uint32)
        scores, scores_out = staging.take((query_heads, item.k), np.int32)
        histogram, histogram_out = staging.take((query_heads, HISTOGRAM_BINS), np.uint32)
        scales, scales_out = staging.take((query_heads, 6), np.float64)
        request.evaluations.add(
            context_id=item.context.context_id,
            first_token=item.first,
            end_token=item.end,
            k=item.k,
            query=query_region,
            ids=ids,
            scores=scores,
            histogram=histogram,
            scales=scales,
        )
        answers.append((ids_out, scores_out, histogram_out, scales_out))
    return request, answers


def rank(session: Session, layer: int, items: Sequence[ApartItem]) -> list[Apart]:
    """See `Session.rank_apart`; under the session's lock."""
    if not items:
        return []
    try:
        request, answers = stage(session.staging(), layer, items)
    except ArenaTooSmall:
        if len(items) == 1:
            raise
        half = len(items) // 2
        return rank(session, layer, items[:half]) + rank(session, layer, items[half:])
    session.ask(request)
    return [taken(answer) for answer in answers]


def taken(answer: tuple[npt.NDArray[Any], ...]) -> Apart:
    """Copy an answer out of the arena."""
    ids, scores, histogram, scales = (array.copy() for array in answer)
    return Apart(ids, scores, histogram, ScoreScale.unpacked(scales))
