"""An application of its own process: fills a context, then checks answers on it until its input ends.

Usage: python peer.py SOCKET SEED. Prints "ready", and at the end "right N" for the N rounds that were right.
"""

from __future__ import annotations

import select
import sys
from pathlib import Path

import numpy as np
from kv_rows import expected_selection, random_kv, random_query

from hillinfer import DType, EvaluateItem, Precision, Session, Shape

SHAPE = Shape(layers=2, kv_heads=2, head_dim=64, dtype=DType.float16, precision=Precision.int4)
TOKENS = 2048  # one append, whose tokens fix the ranges


def main() -> None:
    seed = int(sys.argv[2])
    keys, values = random_kv(SHAPE, TOKENS, seed)
    with Session.connect(Path(sys.argv[1]), name=f"peer {seed}") as session:
        context = session.open_context(SHAPE)
        for layer in range(SHAPE.layers):
            context.append(layer, keys, values)
        query = random_query(4, 64, seed + 1)
        ids, _ = expected_selection(SHAPE, keys, query, 80, 0, TOKENS)
        heads = np.arange(2)[:, None]
        expected = np.stack([keys[heads, ids], values[heads, ids]], axis=2).reshape(-1, 2, 64)
        item = EvaluateItem(context, query, 80, 0, TOKENS, np.empty((2, 0), np.uint32))
        rounds = 0
        print("ready", flush=True)
        while rounds == 0 or not select.select([sys.stdin], [], [], 0)[0]:
            [brought] = session.evaluate_and_bring(rounds % 2, [item])
            np.testing.assert_array_equal(brought.ids, ids)
            np.testing.assert_array_equal(brought.rows, expected)
            rounds += 1
    print(f"right {rounds}", flush=True)


if __name__ == "__main__":
    main()
