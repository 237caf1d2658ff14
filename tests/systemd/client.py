"""An application of a user in the machine: one JSON object a line for what it sees.

client.py once                 evaluates once and checks the answer
client.py load [NAME]          does so until its input ends, on a saved context; attaches anew after an error
client.py save NAME [GROUP]    saves a durable context
client.py check NAME [OWNER]   checks it
"""

from __future__ import annotations

import json
import sys
import threading
import time

import numpy as np

from hillinfer import Context, DType, Session, Shape, errors

SHAPE = Shape(layers=1, kv_heads=2, head_dim=64, dtype=DType.float32)
TOKENS = 2048
PLANTED = 1234
RANDOM = np.random.default_rng(3)
KEYS = RANDOM.standard_normal((SHAPE.kv_heads, TOKENS, SHAPE.head_dim), dtype=np.float32)
VALUES = RANDOM.standard_normal(KEYS.shape, dtype=np.float32)
QUERY = RANDOM.standard_normal((SHAPE.kv_heads, SHAPE.head_dim), dtype=np.float32)
KEYS[:, PLANTED] = 3 * QUERY


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def check(context: Context) -> None:
    """The planted token is ranked first, and its row is the one that was appended."""
    selection = context.evaluate(0, QUERY, 8)
    best = selection.ids[np.arange(SHAPE.kv_heads), selection.scores.argmax(axis=1)]
    keys, values = context.fetch(0, np.full((SHAPE.kv_heads, 1), PLANTED, np.uint32))
    right = (best == PLANTED).all() and (keys[:, 0] == KEYS[:, PLANTED]).all()
    if not right or not (values[:, 0] == VALUES[:, PLANTED]).all():
        tell(wrong=best.tolist())
        raise SystemExit("a wrong answer")


def once(group: str | None = None, **kind: str | None) -> None:
    with Session.connect(timeout_s=20) as session:
        context = session.open_context(SHAPE, **kind)
        if not kind.get("base"):
            context.append(0, KEYS, VALUES)
        check(context)
        if kind.get("durable"):
            context.save(group)
    tell(served=1)


def load(base: str | None) -> None:
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    while not over.is_set():
        served = 0
        try:
            with Session.connect(timeout_s=20) as session:
                context = session.open_context(SHAPE, base=base)
                if base is None:
                    context.append(0, KEYS, VALUES)
                while not over.is_set():
                    check(context)
                    served += 1
                    if served == 1:
                        tell(attached=session.session_id)
                    time.sleep(0.01)
            tell(served=served, restarts=session.restarts)
        except errors.HillInferError as error:
            tell(served=served, error=type(error).__name__, message=str(error))
            time.sleep(0.05)


if __name__ == "__main__":
    what, name, who = (*sys.argv[1:], None, None)[:3]
    try:
        if what == "load":
            load(name)
        else:
            kinds = {"save": {"durable": name, "group": who}, "check": {"base": name, "owner": who}}
            once(**kinds.get(what, {}))
    except errors.HillInferError as error:
        tell(error=type(error).__name__, message=str(error))
        raise SystemExit(1) from None
