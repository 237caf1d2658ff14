"""The cold pool at work while the model computes a step of several tokens: reads ahead, appends after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Background:
    """Runs tasks one after another in the one thread of `executor`. Used by one thread.

    So a read that is asked for after an append sees what was appended.
    """

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self._appends: list[Future[None]] = []

    def ahead(self, reads: Sequence[Callable[[], T]]) -> Iterator[T]:
        """Return the results of `reads` in turn, each begun while the one before is used; the first now.

        Blocks until a result is there. Raises what its read raises.
        """
        following = self._executor.submit(reads[0]) if reads else None
        return self._results(following, reads[1:])

    def _results(self, following: Future[T] | None, rest: Sequence[Callable[[], T]]) -> Iterator[T]:
        waiting = iter(rest)
        try:
            while following is not None:
                result = following.result()
                read = next(waiting, None)
                following = None if read is None else self._executor.submit(read)
                yield result
        finally:
            if following is not None:
                following.cancel()

    def append(self, task: Callable[[], None]) -> None:
        """Begin on `task` when all before it are done; see `settle`."""
        self._appends.append(self._executor.submit(task))

    def settle(self) -> None:
        """Wait for the appends. Raises what the first that failed raised; later ones are not begun."""
        appends, self._appends = self._appends, []
        try:
            for each in appends:
                each.result()
        except BaseException:
            for each in appends:
                each.cancel()
            raise
