"""The pipeline of one cache: a layer's tokens are asked for while the layer before computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from hillinfer.hkm.background import Background
from hillinfer.hkm.staging import on_accelerator
from hillinfer.pipeline import choice, device
from hillinfer.pipeline.alone import is_same
from hillinfer.pipeline.choice import Measured, Predictor
from hillinfer.pipeline.job import Job, Jobs, Prefetched, append_for_next
from hillinfer.pipeline.timeline import APPEND, COMPUTE, EVALUATE, MODEL, PREDICT, WAIT, WORKER, Timeline
from hillinfer.pipeline.under_way import InThread, Query, Request
from hillinfer.session import Brought, EvaluateItem, Session
from hillinfer_core.errors import HillInferError, UnsupportedModel

if TYPE_CHECKING:
    from hillinfer.hkm.layer import HierarchicalLayer
    from hillinfer.hkm.policy import SelectionPolicy


@dataclass
class LayerState:
    """Predictor in use, and what it is chosen by.

    known: whether next_layer can be asked for; own: whether what was said to be the layer's own query was.
    """

    predictor: Predictor
    measured: Measured = field(default_factory=Measured)
    step: int = 0
    known: bool = True
    own: bool = True


class Pipeline:
    """Prefetch for the layers of one cache.

    Called by the thread of the model; one worker thread to `close`, for what a `Request` cannot do.
    """

    def __init__(self, session: Session, policy: SelectionPolicy, predictor: Predictor, layers: int) -> None:
        self.predictor = predictor
        self.timeline = Timeline()
        first = Predictor.exact if predictor is Predictor.auto else predictor
        self.layers = [LayerState(first) for _ in range(layers)]
        self.nbytes = 0
        """Bytes of rows that wait for their layer, at most."""
        self.asks_own = predictor in (Predictor.auto, Predictor.next_layer)
        """Whether `before_own` is to be called: `exact` ranks in the layer."""
        self._session = session
        self.policy = policy
        self._policy_lock = threading.Lock()
        self._maker = Jobs()
        self._jobs: dict[int, Job] = {}
        self._postponed: tuple[Job, torch.Tensor, Query] | None = None
        self._side = device.SideStream()
        self._executor = ThreadPoolExecutor(1, "hillinfer-prefetch")
        self.background = Background(self._executor)
        """The same thread, for steps of several tokens, in which nothing is prefetched."""

    def select(self, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        """Ask the policy, one thread at a time. Blocks."""
        with self._policy_lock:
            return self.policy.select(self._session, layer, items)

    def forget_interrupted(self, *, own: bool) -> None:
        """Forget what a step that was interrupted in its first layer had asked for; own: by `before_own` too.

        Called as a step begins, which has nothing of that under way then. Blocks. Raises nothing: of what is
        wrong with the daemon the step will hear itself.
        """
        self._postponed = None
        for index in [index for index, job in self._jobs.items() if job.ahead and (own or job.own is None)]:
            with suppress(HillInferError):
                self.drop(index)

    def before(
        self,
        layer: HierarchicalLayer,
        query: Callable[[], torch.Tensor],
        computing: HierarchicalLayer | None = None,
    ) -> None:
        """Begin on `layer` with a query that `query` predicts, [B, H, 1, D], if it is to be ranked by one.

        If the layer that is `computing` meanwhile ranks itself, that goes first: begins at `begin_postponed`.
        So does a query that is still on its way from an accelerator.
        """
        state = self.layers[layer.index]
        sampled = self._is_sampled(state)
        if not layer.is_initialized or not (state.predictor is Predictor.next_layer or sampled):
            return
        if not state.known or layer.index in self._jobs:
            return
        job = self._maker.make(layer, state.step, sampled, ahead=True)
        if job is None:
            return
        start = perf_counter()
        try:
            predicted = query()
        except UnsupportedModel:
            if self.predictor is not Predictor.auto:
                raise
            state.known = False
            return
        self.timeline.note(MODEL, PREDICT, state.step, layer.index, start)
        host = device.to_host(predicted[:, :, 0])
        if computing is not None and (on_accelerator(predicted) or computing.index not in self._jobs):
            self._postponed = job, predicted, host
        else:
            self._begin(job, predicted, host)

    def before_own(self, layer: HierarchicalLayer, query: Callable[[], torch.Tensor]) -> None:
        """Begin on `layer`, which nothing precedes, with what `query` says will be its own [B, H, 1, D].

        `take` makes sure that it is, but for rounding. Nothing begins where another thread would have to, or
        on an accelerator, whose query the host would wait for.
        """
        state = self.layers[layer.index]
        if not state.own or not layer.is_initialized or layer.index in self._jobs:
            return
        if not Request.serves(self.policy) or on_accelerator(layer.slots.keys):
            return
        job = self._maker.make(layer, state.step, self._is_sampled(state), ahead=True)
        if job is None:
            return
        start = perf_counter()
        try:
            job.own = query()
        except UnsupportedModel:
            state.own = False
            return
        self.timeline.note(MODEL, PREDICT, state.step, layer.index, start)
        self._begin(job, job.own, device.to_host(job.own[:, :, 0]))

    def begin_postponed(self) -> None:
        """Begin on what waited for the layer that has its own selection now."""
        if self._postponed is not None:
            postponed, self._postponed = self._postponed, None
            self._begin(*postponed)

    def take(self, layer: HierarchicalLayer, query: torch.Tensor) -> tuple[Job, Prefetched] | None:
        """Return what was brought for the decode step that `layer` begins; None if nothing fits it.

        query: the layer's own, [B, H, 1, D]. Blocks until it is there. Raises what there was to be raised.
        """
        job = self._jobs.pop(layer.index, None)
        if job is None or job.answer is None:
            return None
        start, note = perf_counter(), self.timeline.note
        found = job.answer.result()
        note(MODEL, WAIT, job.step, layer.index, start)
        if found.asked > found.began:
            note(WORKER, APPEND, job.step, layer.index, found.began, found.asked)
        note(WORKER, EVALUATE, job.step, layer.index, found.asked, found.ended)
        waited = start if job.waited is None else job.waited
        if not job.first:
            self.layers[layer.index].measured.timed(found.ended - found.began, waited - job.began)
        if job.lengths != layer.slots.lengths.tolist():
            return None  # made for another step
        if job.own is not None and not is_same(job.own, query):
            self.layers[layer.index].own = False
            return None
        others = (other.answer.come() for other in self._jobs.values() if other.answer is not None)
        waiting = chain(found.brought or (), chain.from_iterable(others))
        self.nbytes = max(self.nbytes, sum(each.rows.nbytes for each in waiting))
        return job, found

    def attended(
        self, layer: HierarchicalLayer, query: torch.Tensor, losses: dict[Predictor, float] | None
    ) -> None:
        """Note that `layer` made a decode step with its own `query` [B, H, 1, D]; losses: if sampled."""
        state = self.layers[layer.index]
        if losses is not None:
            state.measured.lost(losses)
        if self.predictor is Predictor.auto:
            chosen = choice.choose(state.predictor, state.measured, layer.slots.attended)
            same, state.predictor = chosen is state.predictor, chosen
            if losses is not None or not same:
                confirmed = same and state.measured.is_clear(chosen)
                state.measured.look_again(state.step, layer.index, confirmed=confirmed)
        state.step += 1
        if Request.serves(self.policy) and not on_accelerator(query):
            start = perf_counter()
            if append_for_next(layer):
                self._note_amid_compute(APPEND, state.step - 1, layer.index, start, perf_counter())
        if state.predictor is Predictor.previous_step:
            job = self._maker.make(layer, state.step, self._is_sampled(state), ahead=False)
            if job is not None:
                self._begin(job, query, device.to_host(query[:, :, 0]))

    @property
    def most_waiting(self) -> int:
        """Layers whose rows wait at once, at most: those asked for a step ahead, or else the next one."""
        if self.predictor is Predictor.exact:
            return 0
        return max(1, sum(state.predictor is Predictor.previous_step for state in self.layers))

    @property
    def pending(self) -> list[int]:
        """Layers for which something is asked for."""
        return list(self._jobs)

    def samples(self, layer: int) -> bool:
        """Whether the step in progress of `layer` is sampled."""
        return self._is_sampled(self.layers[layer])

    def drop(self, layer: int | None = None) -> None:
        """Forget what was asked for `layer` (None: all), once nothing of it is under way.

        Blocks. Raises what there was to be raised.
        """
        self._postponed = None
        self._maker.forget()
        for index in [layer] if layer is not None else list(self._jobs):
            job = self._jobs.pop(index, None)
            if job is not None and job.answer is not None:
                job.answer.drop()

    def close(self) -> None:
        """End what is under way, and the worker; idempotent, harmless after errors. Blocks."""
        with suppress(HillInferError):
            self.drop()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._jobs.clear()

    def _is_sampled(self, state: LayerState) -> bool:
        return self.predictor is Predictor.auto and choice.is_sampled(state.measured, state.step)

    def _note_amid_compute(self, name: str, step: int, layer: int, start: float, end: float) -> None:
        timeline, of = self.timeline, (step, layer)
        if timeline.mark:
            timeline.note(MODEL, COMPUTE, *of, timeline.mark, start)
        timeline.note(MODEL, name, *of, start, end)
        timeline.mark = end if timeline.mark else 0.0

    def _note_waiting(self, job: Job, start: float, waited_before: float) -> float:
        """Note what was waited for since `start`, as if the layers it was for did; return when that ended."""
        waited = self._session.waited_s - waited_before
        if not waited:
            return start
        for other in self._jobs.values():
            if other.answer is not None and other.waited is None and other.answer.is_kept():
                other.waited = start
        self._note_amid_compute(WAIT, job.step, job.layer.index, start, start + waited)
        return start + waited

    def _begin(self, job: Job, query: torch.Tensor, host: Query) -> None:
        start, waited = perf_counter(), self._session.waited_s
        if job.appends and Request.serves(self.policy):
            # Here and not in the worker, which would want the interpreter's lock meanwhile, several times.
            # After several tokens at once all layers have some: the daemon takes them one after another.
            for each in job.layer.cache.full_layers[job.layer.index :]:
                if not append_for_next(each):
                    break
            job.append_ahead()
            begun = self._note_waiting(job, start, waited)
            start, waited = perf_counter(), self._session.waited_s
            self._note_amid_compute(APPEND, job.step, job.layer.index, begun, start)
        job.answer = Request.send(self._session, self.policy, job, host)
        job.began = self._note_waiting(job, start, waited)
        if job.answer is None:
            mark = device.mark(query.device)
            job.answer = InThread(self._executor, job, host, mark, self._side, self.select)
        self._jobs[job.layer.index] = job
