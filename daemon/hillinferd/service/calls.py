"""A call of a transport that awaits nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Answer = Callable[[Any, Exception | None], None]
"""Called once with what a call came to, unless it was given up. Must not raise."""


class Call:
    """A :class:`~.work_queue.Result` that hands the outcome to ``answer``; ``over`` is called before it.

    ``over`` is called once, also if the call is given up.
    """

    def __init__(self, answer: Answer, over: Callable[[], None]) -> None:
        self._answer: Answer | None = answer
        self._over = over

    def give_up(self) -> None:
        """Leave: there will be no answer, and what waits for its turn is not begun."""
        self._end()

    def done(self) -> bool:
        """Whether it was answered or given up."""
        return self._answer is None

    def set_result(self, value: Any) -> None:
        """Answer."""
        if (answer := self._end()) is not None:
            answer(value, None)

    def set_exception(self, error: Exception) -> None:
        """Answer with an error."""
        if (answer := self._end()) is not None:
            answer(None, error)

    def _end(self) -> Answer | None:
        answer, self._answer = self._answer, None
        if answer is not None:
            self._over()
        return answer
