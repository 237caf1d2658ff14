"""Your own attention on numpy arrays, with the keys and values in HillInfer's cold pool.

Appends 8,192 tokens to one layer, one of them the token that the query is
looking for, and attends to the 2 % that rank highest. Run it as

    python examples/session.py
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from hillinfer import DType, Precision, PrivateDaemon, Session, Shape, errors

SHAPE = Shape(layers=1, kv_heads=2, head_dim=64, dtype=DType.float32, precision=Precision.int4)
QUERY_HEADS = 4
TOKENS = 8192
PLANTED = 1234
BUDGET = TOKENS * 2 // 100


def attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[QUERY_HEADS, head_dim] for keys and values [kv_heads, n, head_dim]."""
    grouped = query.reshape(SHAPE.kv_heads, -1, SHAPE.head_dim)
    logits = grouped @ keys.transpose(0, 2, 1) / np.sqrt(SHAPE.head_dim)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ values).reshape(QUERY_HEADS, SHAPE.head_dim)


def connect(stack: ExitStack) -> Session:
    """A session of the running daemon, or of one started for this program."""
    try:
        return stack.enter_context(Session.connect(name="session example"))
    except errors.DaemonUnavailable:
        daemon = stack.enter_context(PrivateDaemon())
        return stack.enter_context(Session.connect(daemon.socket, name="session example"))


def main() -> None:
    random = np.random.default_rng(0)
    keys = random.standard_normal((SHAPE.kv_heads, TOKENS, SHAPE.head_dim), dtype=np.float32)
    values = random.standard_normal(keys.shape, dtype=np.float32)
    query = np.repeat(random.standard_normal((SHAPE.kv_heads, SHAPE.head_dim), dtype=np.float32), 2, axis=0)
    keys[:, PLANTED] = 2 * query[::2]

    with ExitStack() as stack:
        context = connect(stack).open_context(SHAPE)
        context.append(0, keys, values)

        selection = context.evaluate(0, query, BUDGET)
        winner_keys, winner_values = context.fetch(0, selection.ids)

    best = selection.ids[np.arange(SHAPE.kv_heads), selection.scores.argmax(axis=1)]
    sparse = attention(query, winner_keys, winner_values)
    full = attention(query, keys, values)
    error = np.linalg.norm(sparse - full) / np.linalg.norm(full)
    print(f"highest-ranked token of each head: {best.tolist()} (planted: {PLANTED})")
    print(f"attended to {BUDGET} of {TOKENS} tokens; relative difference from full attention: {error:.4f}")


if __name__ == "__main__":
    main()
