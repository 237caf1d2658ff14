"""An honest session whose every answer is compared with numpy's."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from raw_client import RawClient, random_rows

from hillinfer_core import reference
from hillinfer_core.layout import DType, Precision, Reduction, Shape

SHAPE = Shape(1, 2, 64, DType.float16, Precision.int8)
TOKENS = 256
K = 24


class Honest:
    """A context filled once. :meth:`check` ranks, brings and fetches; every byte must be right."""

    def __init__(self, runtime_dir: Path, seed: int = 7) -> None:
        rng = np.random.default_rng(seed)
        self._rows = random_rows(rng, SHAPE, TOKENS)
        self._query = rng.standard_normal((4, SHAPE.head_dim)).astype(np.float32)
        self._client = RawClient(runtime_dir, 1 << 20)
        self._context = self._client.open(SHAPE)
        self._client.append(self._context, 0, 0, self._rows)
        self._expected = selection(self._rows, self._query)

    def __enter__(self) -> Honest:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.__exit__()

    def check(self) -> float:
        """Ask for everything; raises for a wrong byte. Returns the seconds of an evaluation."""
        started = time.monotonic()
        found = self._evaluate()
        seconds = time.monotonic() - started
        for mine, expected in zip(found, self._expected, strict=True):
            np.testing.assert_array_equal(mine, expected)
        fetched = self._client.fetch_range(self._context, SHAPE, 0, 0, TOKENS)
        np.testing.assert_array_equal(fetched, self._rows)
        return seconds

    def restarts(self) -> int:
        """Times that the worker had to be replaced."""
        return self._client.status().device.worker_restarts

    def _evaluate(self) -> tuple[np.ndarray, np.ndarray]:
        ids, best, rows, _ = self._client.evaluate(
            self._context, SHAPE, 0, self._query, K, 0, TOKENS, room=2 * K
        )
        expected = np.concatenate([self._rows[head, ids[head]] for head in range(SHAPE.kv_heads)])
        np.testing.assert_array_equal(rows, expected)
        return ids, best


def selection(rows: np.ndarray, query: np.ndarray, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Ids and scores of the best of ``rows``, as the reference has them."""
    ranges = reference.fit_ranges(reference.widen_keys(rows), SHAPE.precision)
    tiles = reference.quantise_keys(rows, ranges, SHAPE.precision)[0]
    quantised, offsets, _ = reference.quantise_query(query, ranges, Reduction.sum)
    scores = np.empty(rows.shape[:2], np.int32)
    reference.scores(tiles, quantised, SHAPE.precision, scores, offsets=offsets)
    return reference.top_k(scores, k, 0)
