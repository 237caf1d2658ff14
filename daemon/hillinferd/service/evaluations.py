"""All evaluations of one drive: through its queue, and those that the express carries past it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ..domain.contexts import Context
from ..logs import get_logger
from ..worker import messages
from . import admission, pieces, requests
from .evaluating import Evaluating, Prepared
from .express import Permit, Run
from .sessions import Session
from .work_queue import End, Result

if TYPE_CHECKING:
    from .drive import Drive

log = get_logger(__name__)


class Evaluations:
    """Evaluations of ``drive``. One event loop."""

    def __init__(self, drive: Drive) -> None:
        self._drive = drive

    def begin(
        self,
        session: Session,
        ask: requests.Evaluate,
        deadline: float | None,
        result: Result,
        began: float | None = None,
    ) -> None:
        """Rank tokens and bring missing rows; ``result`` gets the packed results. Raises nothing.

        ``began`` is when the worker was sent it already: it has one piece, and the drive is idle.
        """
        drive = self._drive

        def prepare() -> Prepared:
            request, contexts = admission.evaluate(session, drive.catalogue, ask)
            return (
                pieces.of_evaluate(request, [context.shape for context in contexts]),
                [context for context in contexts if not context.loaded],
            )

        async def load(contexts: list[Context]) -> None:
            for context in contexts:
                await drive.ensure_loaded(context)

        Evaluating(
            drive.queue,
            session,
            deadline,
            result,
            prepare=prepare,
            load=load,
            send=self._send if began is None else partial(self._expect, began),
            usages=(drive.usage, session.usage),
            began=began,
        ).enter()

    def took_over(self, answer: bytes) -> None:
        """Go on where :meth:`begin` was given what began already; ``answer`` if the worker has answered."""
        worker = self._drive.worker
        if worker.idle:
            # It was refused, which cannot be: nobody would know whose answer the next one is.
            log.error("an evaluation that was under way was refused", drive=self._drive.name)
            worker.replace()
        elif answer:
            worker.hear(answer)

    def permit(self, session: Session, ask: requests.Evaluate, number: int) -> Permit | None:
        """Return leave to repeat ``ask``, which was carried out; ``number`` is the drive's."""
        held = admission.lasting(session, self._drive.catalogue, ask)
        return None if held is None else Permit(ask.packed, held, number, self._drive.worker.fileno())

    def note(self, session: Session, run: Run) -> None:
        """Account evaluations that were carried past the queue."""
        drive, count = self._drive, len(run.seconds)
        drive.key_bytes = run.key_bytes
        drive.queue.done += count
        drive.worker.exchanges += count
        drive.usage.add_run(run)
        session.usage.add_run(run)
        if drive.run_observer is not None:
            drive.run_observer(run)

    def _send(self, request: messages.Evaluate, end: End) -> None:
        self._drive.worker.send(request, partial(self._answered, end))

    def _expect(self, began: float, request: messages.Evaluate, end: End) -> None:
        self._drive.worker.expect(request, began, partial(self._answered, end))

    def _answered(self, end: End, done: messages.Done | None, error: Exception | None) -> None:
        if done is not None:
            self._drive.key_bytes = done.key_bytes
        end(done, error)
