"""A context of one layer, filled and checked, for tests of the daemon."""

from __future__ import annotations

import numpy as np
from raw_client import RawClient, random_rows

from hillinfer_core.layout import DType, Precision, Shape

SHAPE = Shape(1, 2, 64, DType.float16, Precision.int4)
ROWS = random_rows(np.random.default_rng(0), SHAPE, 4096)
QUERY = np.ones((2, 64), np.float32)


def fill(client: RawClient, tokens: int = 4096) -> int:
    context = client.open(SHAPE)
    client.append(context, 0, 0, ROWS[:, :tokens])
    return context


def check(client: RawClient, context: int) -> None:
    np.testing.assert_array_equal(client.fetch_range(context, SHAPE, 0, 100, 200), ROWS[:, 100:300])
