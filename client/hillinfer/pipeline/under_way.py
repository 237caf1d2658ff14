"""Jobs under way: by a request that the daemon works on, or where that is not enough in a worker thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from time import perf_counter
from typing import Self, TypeGuard

import numpy as np
import numpy.typing as npt

from hillinfer.ahead import Asked
from hillinfer.hkm.policy import ColdPoolRanking, SelectionPolicy
from hillinfer.pipeline import device
from hillinfer.pipeline.job import Job, Prefetched
from hillinfer.session import Brought, EvaluateItem, Session

_TO_PERF_COUNTER = perf_counter() - time.monotonic()

Query = Callable[[], npt.NDArray[np.float32]]
"""Waits for a query float32 [B, H, D], in any thread."""


class Request:
    """The daemon ranks and fetches; no thread of this process takes part."""

    def __init__(self, session: Session, rows: list[int], asked: Asked) -> None:
        self._session, self._rows, self._asked = session, rows, asked

    @staticmethod
    def serves(policy: SelectionPolicy) -> TypeGuard[ColdPoolRanking]:
        """Whether the daemon can be asked so, once what the job ranks has been appended."""
        return isinstance(policy, ColdPoolRanking)

    @classmethod
    def send(cls, session: Session, policy: SelectionPolicy, job: Job, host: Query) -> Self | None:
        """Begin on a job; None where more is to be done for it than that, and nothing has begun."""
        if not cls.serves(policy):
            return None
        rows, items = job.items(host())
        asked = session.ask_ahead(job.layer.index, policy.asked(job.layer.index, items))
        return None if asked is None else cls(session, rows, asked)

    def result(self) -> Prefetched:
        """See `Answer`."""
        brought = self._session.collect(self._asked)
        ended = max(each.answered_at for each in brought)
        # Where nothing says when the answer came, it was asked for again, and is there now.
        begun = max(self._asked.asked_at, self._asked.begun_at) + _TO_PERF_COUNTER
        ended = (ended or time.monotonic()) + _TO_PERF_COUNTER
        return Prefetched(self._rows, brought, [None] * len(brought), begun, begun, ended)

    def come(self) -> Sequence[Brought]:
        """See `Answer`."""
        return self._asked.brought or ()

    def is_kept(self) -> bool:
        """See `Answer`."""
        return self._asked.under_way is None

    def drop(self) -> None:
        """See `Answer`."""
        self._session.settle(self._asked)
        if self._asked.error is not None:
            raise self._asked.error


class InThread:
    """The one thread of `executor` appends, asks the policy by `select`, and starts uploads."""

    def __init__(
        self,
        executor: ThreadPoolExecutor,
        job: Job,
        query: Query,
        mark: device.Mark,
        side: device.SideStream,
        select: Callable[[int, list[EvaluateItem]], list[Brought] | None],
    ) -> None:
        self._job, self._query, self._mark, self._side, self._select = job, query, mark, side, select
        self._future: Future[Prefetched] = executor.submit(self._run)

    def result(self) -> Prefetched:
        """See `Answer`."""
        return self._future.result()

    def come(self) -> Sequence[Brought]:
        """See `Answer`."""
        future = self._future
        done = future.done() and not future.cancelled() and future.exception() is None
        return (future.result().brought or ()) if done else ()

    def is_kept(self) -> bool:
        """See `Answer`: the thread takes one after the other."""
        return False

    def drop(self) -> None:
        """See `Answer`."""
        if not self._future.cancel():
            wait([self._future])
            if (error := self._future.exception()) is not None:
                raise error

    def _run(self) -> Prefetched:
        job, like = self._job, self._job.layer.slots.keys
        with self._side.following(self._mark, like.device):
            began = perf_counter()
            job.append_ahead()
            asked = perf_counter()
            rows, items = job.items(self._query())
            brought = self._select(job.layer.index, items)
            uploaded = [self._side.upload(each.rows, like) for each in brought or ()]
            return Prefetched(rows, brought, uploaded, began, asked, perf_counter())
