"""Memory that its owner rewrites while requests use it: time of check is time of use, whatever it does.

What is looked at twice is copied first, so a rewritten arena spoils no more than its own answers: what got
into the pool was checked, has its checksum, and its evaluation keys are of the same bytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from honest import SHAPE, TOKENS, Honest, selection
from raw_client import CALL_S, RawClient, Refused

from hillinfer_core import kernel
from hillinfer_core.v1 import cold_pool_pb2 as pb

SECONDS = 1.0
ROWS_BYTES = TOKENS * SHAPE.kv_heads * SHAPE.row_bytes
HEADS = 4


@contextmanager
def rewritten(client: RawClient, kind: str) -> Iterator[None]:
    """Have a process rewrite the client's arena meanwhile."""
    fd = _arena_fd(client)
    script = Path(__file__).with_name("rewriter.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(fd), kind, "5"],
        pass_fds=(fd,),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    os.close(fd)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield
    finally:
        rounds, _ = process.communicate("\n", CALL_S)
        assert int(rounds) > 1000


def _arena_fd(client: RawClient) -> int:
    name = f"/memfd:hillinfer-arena-{client.accepted.session_id} (deleted)"
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}") == name:
                return os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        except FileNotFoundError:
            continue
    raise AssertionError("the arena is not mapped")


@pytest.fixture
def owner(daemon: Path) -> Iterator[RawClient]:
    """Has an arena just large enough, so that a rewriter is often where it matters."""
    with RawClient(daemon, ROWS_BYTES) as client:
        yield client


def _append(client: RawClient, context: int, first: int) -> None:
    rows = client.region(0, ROWS_BYTES)
    client.call("Append", pb.AppendRequest(context_id=context, first_token=first, tokens=TOKENS, rows=rows))


def _tokens(client: RawClient) -> dict[int, int]:
    """Tokens of the client's contexts."""
    [mine] = [each for each in client.status().sessions if each.session_id == client.accepted.session_id]
    return {each.context_id: each.tokens for each in mine.contexts}


def test_what_is_appended_is_what_was_checked(owner: RawClient, honest: Honest) -> None:
    contexts = []
    refused: Counter[str] = Counter()
    with rewritten(owner, "rows"):
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            contexts.append(context := owner.open(SHAPE))
            # The fourth fits the ranges again, to all the rows.
            for number in range(4):
                try:
                    _append(owner, context, number * TOKENS)
                except Refused as error:
                    refused[error.error] += 1
                    break
            if len(contexts) % 8 == 0:
                honest.check()
    tokens = _tokens(owner)
    query = np.random.default_rng(3).standard_normal((HEADS, SHAPE.head_dim)).astype(np.float32)
    compared = 0
    for context in contexts:
        if not tokens[context]:
            continue
        held = [owner.fetch_range(context, SHAPE, 0, at, TOKENS) for at in range(0, tokens[context], TOKENS)]
        rows = np.concatenate(held, axis=1)
        assert np.isfinite(rows).all()
        if len(held) in (1, 4):
            k = 12
            ids, scores, _, _ = owner.evaluate(context, SHAPE, 0, query, k, 0, tokens[context])
            for mine, expected in zip((ids, scores), selection(rows, query, k), strict=True):
                np.testing.assert_array_equal(mine, expected)
            compared += 1
    print(f"{len(contexts)} contexts, {compared} ranked as their rows say, refused: {dict(refused)}")
    assert compared
    assert set(refused) <= {"InvalidInput"}


def test_ids_and_queries_that_change_spoil_their_own_answers_only(owner: RawClient, honest: Honest) -> None:
    context = owner.open(SHAPE)
    assert owner.arena is not None
    owner.arena.view(0, (ROWS_BYTES // 2,), np.float16)[:] = 1
    _append(owner, context, 0)
    query = owner.region(0, HEADS * SHAPE.head_dim * 4)
    half = owner.region(ROWS_BYTES // 2, ROWS_BYTES // 2)
    item = pb.Evaluation(context_id=context, end_token=TOKENS, k=8, query=query, ids=owner.region(4096, 64))
    item.held.CopyFrom(owner.region(8192, 8192))
    item.rows.CopyFrom(half)
    apart = pb.Evaluation(context_id=context, end_token=TOKENS, k=8, query=query, ids=owner.region(0, 128))
    apart.histogram.CopyFrom(owner.region(8192, HEADS * 2048 * 4))
    apart.scales.CopyFrom(owner.region(4096, HEADS * 48))
    ids = pb.Ids(count_per_head=[64, 64], ids=owner.region(0, 512))
    keys = pb.KeyRange(end_token=TOKENS, scales=owner.region(0, 512))
    requests: list[tuple[str, object]] = [
        ("Evaluate", pb.EvaluateRequest(query_heads=HEADS, reduction=1, evaluations=[item])),
        ("Evaluate", pb.EvaluateRequest(query_heads=HEADS, reduction=2, evaluations=[item])),
        ("Evaluate", pb.EvaluateRequest(query_heads=HEADS, reduction=3, evaluations=[apart])),
        ("Fetch", pb.FetchRequest(context_id=context, by_ids=ids, rows=half)),
        ("Fetch", pb.FetchRequest(context_id=context, range=pb.TokenRange(count=128), rows=half)),
        ("Fetch", pb.FetchRequest(context_id=context, keys=keys, rows=half)),
    ]
    outcomes: Counter[tuple[str, str]] = Counter()
    with rewritten(owner, "bytes"):
        _until(SECONDS, lambda number: _try(owner, *requests[number % len(requests)], outcomes), honest)
    print(dict(outcomes))
    # Ids that do not exist, numbers that are none, and rows that changed before they were checked.
    assert {error for _, error in outcomes} <= {"", "InvalidInput", "CorruptData"}
    assert outcomes["Fetch", "InvalidInput"]
    assert outcomes["Evaluate", "InvalidInput"]
    rows = owner.fetch_range(context, SHAPE, 0, 0, TOKENS // 2)
    assert (rows == 1).all()
    tiles = _tiles(owner, context)
    np.testing.assert_array_equal(tiles[0], tiles[0][:, :1].repeat(tiles[0].shape[1], axis=1))


def _until(seconds: float, attempt: Callable[[int], None], honest: Honest) -> None:
    number, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        attempt(number)
        number += 1
        if number % 50 == 0:
            honest.check()


def _try(client: RawClient, method: str, request: object, outcomes: Counter[tuple[str, str]]) -> None:
    try:
        client.call(method, request)
        outcomes[method, ""] += 1
    except Refused as error:
        outcomes[method, error.error] += 1


def _tiles(client: RawClient, context: int) -> np.ndarray:
    """The evaluation keys, held to their checksums."""
    client.reset()
    region, tiles = client.take((SHAPE.kv_heads, TOKENS // 16, SHAPE.key_tile_bytes), np.uint8)
    scales, _ = client.take((SHAPE.kv_heads, SHAPE.head_dim), np.float32)
    keys = pb.KeyRange(end_token=TOKENS, scales=scales)
    answer = client.call("Fetch", pb.FetchRequest(context_id=context, keys=keys, rows=region))
    assert list(answer.key_checksums) == kernel.data_checksums(tiles.copy()).tolist()
    return tiles.copy()
