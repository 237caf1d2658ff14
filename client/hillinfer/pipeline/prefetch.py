"""The pipeline of one cache: a worker asks for a layer's tokens while the layer before computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from hillinfer.hkm.background import Background
from hillinfer.pipeline import choice, device
from hillinfer.pipeline.choice import Measured, Predictor
from hillinfer.pipeline.job import Job, Prefetched, make_job
from hillinfer.pipeline.timeline import APPEND, EVALUATE, MODEL, PREDICT, WAIT, WORKER, Timeline
from hillinfer.session import Brought, EvaluateItem, Session
from hillinfer_core.errors import UnsupportedModel

if TYPE_CHECKING:
    from hillinfer.hkm.layer import HierarchicalLayer
    from hillinfer.hkm.policy import SelectionPolicy

Query = Callable[[], npt.NDArray[np.float32]]
"""Waits for a query float32 [B, H, D], in any thread."""


@dataclass
class LayerState:
    """Predictor in use, and what it is chosen by. known: whether next_layer can be asked for."""

    predictor: Predictor
    measured: Measured = field(default_factory=Measured)
    step: int = 0
    known: bool = True


class Pipeline:
    """Prefetch for the layers of one cache.

    Called by the thread of the model; one worker thread, from the first prefetch to `close`.
    """

    def __init__(self, session: Session, policy: SelectionPolicy, predictor: Predictor, layers: int) -> None:
        self.predictor = predictor
        self.timeline = Timeline()
        first = Predictor.exact if predictor is Predictor.auto else predictor
        self.layers = [LayerState(first) for _ in range(layers)]
        self.nbytes = 0
        """Bytes of rows that wait for their layer, at most."""
        self._session = session
        self.policy = policy
        self._policy_lock = threading.Lock()
        self._jobs: dict[int, Job] = {}
        self._side = device.SideStream()
        self._executor = ThreadPoolExecutor(1, "hillinfer-prefetch")
        self.background = Background(self._executor)
        """The same thread, for steps of several tokens, in which nothing is prefetched."""

    def select(self, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        """Ask the policy, one thread at a time. Blocks."""
        with self._policy_lock:
            return self.policy.select(self._session, layer, items)

    def before(self, layer: HierarchicalLayer, query: Callable[[], torch.Tensor]) -> None:
        """Begin on `layer` with a query that `query` predicts, [B, H, 1, D], if it is to be ranked by one."""
        state = self.layers[layer.index]
        sampled = self._is_sampled(state, layer.index)
        if not layer.is_initialized or not (state.predictor is Predictor.next_layer or sampled):
            return
        if not state.known or layer.index in self._jobs:
            return
        job = make_job(layer, state.step, sampled, ahead=True)
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
        self._begin(job, predicted)
        self.timeline.note(MODEL, PREDICT, state.step, layer.index, start)

    def take(self, layer: HierarchicalLayer) -> tuple[Job, Prefetched] | None:
        """Return what was brought for the decode step that `layer` begins; None if nothing fits it.

        Blocks until the worker is done with it. Raises what the worker ran into.
        """
        job = self._jobs.pop(layer.index, None)
        if job is None or job.future is None:
            return None
        start = perf_counter()
        prefetched = job.future.result()
        self.timeline.note(MODEL, WAIT, job.step, layer.index, start)
        self.layers[layer.index].measured.timed(prefetched.seconds, start - job.asked)
        if job.lengths != layer.slots.lengths.tolist():
            return None  # made for another step
        self.nbytes = max(self.nbytes, sum(each.rows.nbytes for each in prefetched.brought or ()))
        return job, prefetched

    def attended(
        self, layer: HierarchicalLayer, query: torch.Tensor, losses: dict[Predictor, float] | None
    ) -> None:
        """Note that `layer` made a decode step with its own `query` [B, H, 1, D]; losses: if sampled."""
        state = self.layers[layer.index]
        if losses is not None:
            state.measured.lost(losses)
        if self.predictor is Predictor.auto:
            state.predictor = choice.choose(state.predictor, state.measured, layer.slots.attended)
        state.step += 1
        if state.predictor is Predictor.previous_step:
            job = make_job(layer, state.step, self._is_sampled(state, layer.index), ahead=False)
            if job is not None:
                self._begin(job, query)

    @property
    def pending(self) -> list[int]:
        """Layers for which something is asked for."""
        return list(self._jobs)

    def samples(self, layer: int) -> bool:
        """Whether the step in progress of `layer` is sampled."""
        return self._is_sampled(self.layers[layer], layer)

    def drop(self, layer: int | None = None) -> None:
        """Forget what was asked for `layer` (None: all), once the worker is done with it.

        Blocks. Raises what the worker ran into.
        """
        for index in [layer] if layer is not None else list(self._jobs):
            job = self._jobs.pop(index, None)
            if job is not None and job.future is not None and not job.future.cancel():
                wait([job.future])
                if (error := job.future.exception()) is not None:
                    raise error

    def close(self) -> None:
        """End the worker once it is done with what it began; idempotent, harmless after errors. Blocks."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._jobs.clear()

    def _is_sampled(self, state: LayerState, layer: int) -> bool:
        return self.predictor is Predictor.auto and choice.is_sampled(state.measured, state.step, layer)

    def _begin(self, job: Job, query: torch.Tensor) -> None:
        host = device.to_host(query[:, :, 0])
        mark = device.mark(query.device)
        job.asked = perf_counter()
        job.future = self._executor.submit(self._run, job, host, mark)
        self._jobs[job.layer.index] = job

    def _run(self, job: Job, query: Query, mark: device.Mark) -> Prefetched:
        layer, note = job.layer, self.timeline.note
        like: torch.Tensor = layer.slots.keys
        with self._side.following(mark, like.device):
            start = began = perf_counter()
            if job.append_ahead():
                start = note(WORKER, APPEND, job.step, layer.index, start)
            rows, items = job.items(query())
            brought = self.select(layer.index, items)
            uploaded: list[Any] = [self._side.upload(each.rows, like) for each in brought or ()]
            end = note(WORKER, EVALUATE, job.step, layer.index, start)
        return Prefetched(rows, brought, uploaded, end - began)
