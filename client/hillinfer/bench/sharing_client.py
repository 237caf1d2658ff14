"""One application of `hillinfer bench sharing`: a process that does what it is told on standard input.

Started with its attach socket, uid and gid (as JSON); it becomes that user before it attaches.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from hillinfer import wire
from hillinfer.context import Context
from hillinfer.session import Session
from hillinfer_core.errors import HillInferError
from hillinfer_core.layout import DType, Reduction, Shape
from hillinfer_core.v1 import cold_pool_pb2

SHAPE = Shape(layers=1, kv_heads=8, head_dim=128, dtype=DType.float16)

ALPHA = 0.02
"""Winners as a fraction of the tokens: the default budget; the client holds none of them."""

APPENDED_TOKENS = 2048
"""Tokens of one step of a bulk append, 8 MiB of rows: the library makes several appends of it."""

_ARENA = 48 << 20


class WrongAnswerError(HillInferError):
    """An evaluation gave something else than the same one before."""


class Application:
    """A session with a context of `tokens` random tokens, and the work it can be asked for."""

    def __init__(self, socket: Path, tokens: int, rng: np.random.Generator) -> None:
        self.tokens = tokens
        self._rng = rng
        self.session = Session.connect(socket, _ARENA, "bench sharing")
        self.context = self._filled(self.session.open_context(SHAPE), tokens)
        self._query = self._rng.standard_normal((SHAPE.kv_heads, SHAPE.head_dim)).astype(np.float32)

    def evaluate(self, start: float, seconds: float, depth: int) -> list[tuple[float, float]]:
        """Evaluate from `start` for `seconds`, with `depth` requests in flight; (end, latency) of each."""
        done: list[tuple[float, float]] = []
        failed: list[BaseException] = []
        self.session.staging().reset()
        threads = [
            threading.Thread(
                target=self._stream, args=(start, start + seconds, self._request(), done, failed)
            )
            for _ in range(depth)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return done

    def append(self, start: float, seconds: float) -> list[tuple[float, float]]:
        """Append from `start` for `seconds` as fast as it goes; (end, latency) of each step of 8 MiB."""
        done: list[tuple[float, float]] = []
        rows = self._rng.standard_normal((SHAPE.kv_heads, APPENDED_TOKENS, SHAPE.head_dim)).astype(np.float16)
        context = self.session.open_context(SHAPE)
        _sleep_until(start)
        while (begun := time.monotonic()) < start + seconds:
            context.append(0, rows, rows)
            done.append((time.monotonic(), time.monotonic() - begun))
        context.close()
        return done

    def _filled(self, context: Context, tokens: int) -> Context:
        for _ in range(0, tokens, APPENDED_TOKENS):
            keys, values = self._rng.standard_normal(
                (2, SHAPE.kv_heads, APPENDED_TOKENS, SHAPE.head_dim)
            ).astype(np.float16)
            context.append(0, keys, values)
        return context

    def _request(self) -> tuple[cold_pool_pb2.EvaluateRequest, Any]:
        k = int(ALPHA * self.tokens)
        staging = self.session.staging()
        query_region, query = staging.take(self._query.shape, np.float32)
        ids_region, ids = staging.take((SHAPE.kv_heads, k), np.uint32)
        rows_region, _ = staging.take((SHAPE.kv_heads * k, SHAPE.row_bytes), np.uint8)
        query[...] = self._query
        request = cold_pool_pb2.EvaluateRequest(
            layer=0, query_heads=SHAPE.kv_heads, reduction=wire.number(Reduction.sum)
        )
        request.evaluations.add(
            context_id=self.context.context_id,
            first_token=0,
            end_token=self.tokens,
            k=k,
            query=query_region,
            ids=ids_region,
            rows=rows_region,
        )
        return request, ids

    def _stream(
        self,
        start: float,
        end: float,
        asked: tuple[cold_pool_pb2.EvaluateRequest, Any],
        done: list[tuple[float, float]],
        failed: list[BaseException],
    ) -> None:
        request, ids = asked
        stream = self.session.new_stream()
        try:
            stream.ask(request)
            first = ids.copy()
            _sleep_until(start)
            while (begun := time.monotonic()) < end:
                ids[...] = 0
                stream.ask(request)
                now = time.monotonic()
                done.append((now, now - begun))
                if not np.array_equal(ids, first):
                    raise WrongAnswerError("an evaluation gave other tokens than before")
        except BaseException as error:
            failed.append(error)
        finally:
            stream.close()


def main() -> None:
    """Serve commands until standard input ends."""
    told = json.loads(sys.argv[1])
    # Before the change of user, to whom the interpreter's files may be closed.
    rng = np.random.default_rng(told["seed"])
    if told["uid"] != os.getuid():
        os.setgroups([])
        os.setgid(told["gid"])
        os.setuid(told["uid"])
    application = Application(Path(told["socket"]), told["tokens"], rng)
    print(json.dumps({"ready": os.getuid()}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        work = getattr(application, ask.pop("work"))
        print(json.dumps(work(**ask)), flush=True)


def _sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.monotonic()))


if __name__ == "__main__":
    main()
