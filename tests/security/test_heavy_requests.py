"""Requests that are allowed and as heavy as they can be made: others are served between their pieces."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from honest import SHAPE, TOKENS, Honest
from raw_client import RawClient, Refused, log_of, random_rows
from service_thread import drive_settings, served

from hillinfer_core.layout import DType, Precision, Shape
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinferd.domain import contexts
from hillinferd.service.admission import MAX_HELD

ARENA = 80 << 20
MANY_HEADS = Shape(1, 1024, 8, DType.float16, Precision.int8)


@pytest.fixture
def heavy(daemon: Path):
    with RawClient(daemon, ARENA) as client:
        yield client


def _beside(client: RawClient, method: str, request: object, honest: Honest) -> tuple[int, float]:
    """Make the heavy request; return how often the other was answered meanwhile, and its longest wait."""
    thread = threading.Thread(target=lambda: client.call(method, request))
    thread.start()
    waits = []
    while thread.is_alive():
        waits.append(honest.check())
    thread.join()
    print(f"{len(waits)} evaluations beside it, {max(waits) * 1e3:.0f} ms at most")
    return len(waits), max(waits)


def _evaluation(client: RawClient, held: int) -> pb.Evaluation:
    context = client.open(SHAPE)
    client.append(context, 0, 0, random_rows(np.random.default_rng(0), SHAPE, TOKENS))
    item = pb.Evaluation(context_id=context, end_token=TOKENS, k=8, query=client.region(0, 4 * 64 * 4))
    item.ids.CopyFrom(client.region(4096, 64))
    item.held.CopyFrom(client.region(0, held))
    return item


def test_held_ids_without_number_are_looked_through_in_pieces(heavy: RawClient, honest: Honest) -> None:
    item = _evaluation(heavy, MAX_HELD)
    request = pb.EvaluateRequest(query_heads=4, reduction=1, evaluations=[item] * 16)
    assert heavy.arena is not None
    heavy.arena.view(0, (256,), np.float32)[:] = 1
    answered, _ = _beside(heavy, "Evaluate", request, honest)
    assert answered >= 3


def test_more_held_ids_than_that_are_refused(heavy: RawClient, honest: Honest) -> None:
    item = _evaluation(heavy, MAX_HELD + 8)
    with pytest.raises(Refused, match="held: ") as caught:
        heavy.call("Evaluate", pb.EvaluateRequest(query_heads=4, reduction=1, evaluations=[item]))
    assert caught.value.error == "InvalidInput"


def test_rows_without_number_are_brought_in_pieces(heavy: RawClient, honest: Honest) -> None:
    context = heavy.open(MANY_HEADS)
    heavy.append(context, 0, 0, random_rows(np.random.default_rng(0), MANY_HEADS, 128))
    count = (ARENA - (32 << 20)) // MANY_HEADS.row_bytes // 1024
    ids = pb.Ids(count_per_head=[count] * 1024, ids=heavy.region(0, count * 1024 * 4))
    rows = heavy.region(32 << 20, count * 1024 * MANY_HEADS.row_bytes)
    assert heavy.arena is not None
    heavy.arena.view(0, (count * 1024,), np.uint32)[:] = 5
    request = pb.FetchRequest(context_id=context, by_ids=ids, rows=rows)
    answered, _ = _beside(heavy, "Fetch", request, honest)
    assert answered >= 3


def test_contexts_without_number_are_closed_one_at_a_time(daemon: Path, honest: Honest) -> None:
    client = RawClient(daemon, 4096)
    for _ in range(600):
        client.open(SHAPE)
    client.__exit__()
    waits = []
    while f"session ended session={client.accepted.session_id} " not in log_of(daemon):
        waits.append(honest.check())
    print(f"{len(waits)} evaluations meanwhile, {max(waits) * 1e3:.0f} ms at most")
    # All of them in one piece would leave room for one.
    assert len(waits) >= 3


def test_a_session_has_no_more_than_so_many_contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "MAX_SESSION_CONTEXTS", 3)
    with served(tmp_path, drive_settings("one", tmp_path / "pool")), RawClient(tmp_path) as client:
        opened = [client.open(SHAPE) for _ in range(3)]
        with pytest.raises(Refused, match="3 contexts open") as caught:
            client.open(SHAPE)
        assert caught.value.error == "QuotaExceeded"
        client.close_context(opened[0])
        client.open(SHAPE)
