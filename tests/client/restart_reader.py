"""Asks the same of a saved context until a line comes in; says how many restarts of the daemon that was."""

from __future__ import annotations

import select
import sys
from pathlib import Path

import numpy as np
from kv_rows import random_query

from hillinfer import Context, DType, EvaluateItem, Precision, Session, Shape

SHAPE = Shape(layers=2, kv_heads=2, head_dim=64, dtype=DType.float16, precision=Precision.int4)
LABELS = {"text": "t1"}


def read(session: Session) -> Context:
    return session.open_context(SHAPE, base="book", labels=LABELS)


def main() -> None:
    with Session.connect(Path(sys.argv[1]), timeout_s=20, restart_s=20) as session:
        context = read(session)
        asked = EvaluateItem(
            context, random_query(4, 64), 9, 0, context.flushed(0), np.empty((2, 0), np.uint32)
        )
        [first] = session.evaluate_and_bring(0, [asked])
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], 0.02)[0]:
            [again] = session.evaluate_and_bring(0, [asked])
            same = np.array_equal(again.ids, first.ids) and np.array_equal(again.rows, first.rows)
            if not same or again.generation != first.generation:
                sys.exit(f"another answer; {SHAPE}")
        print(f"{session.restarts} restarts, all the same")


if __name__ == "__main__":
    main()
