"""A decode step of one layer: take what was prefetched or rank now, put it into slots, attend."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import torch

from hillinfer.hkm.attention import attend_slots, attend_stored
from hillinfer.pipeline.device import Uploaded
from hillinfer.pipeline.job import Job, Prefetched, held, items
from hillinfer.pipeline.measure import Sample
from hillinfer.pipeline.timeline import APPEND, COMPUTE, EVALUATE, LATE, MODEL, PLACE
from hillinfer.session import Brought
from hillinfer_core.errors import CorruptData

if TYPE_CHECKING:
    from hillinfer.hkm.layer import HierarchicalLayer


def decode(
    layer: HierarchicalLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Store the new token's KV [B, Hkv, 1, D] and attend `query` [B, H, 1, D] to the selection. Blocks."""
    slots, pipeline = layer.slots, layer.cache.pipeline
    step, timeline = pipeline.layers[layer.index].step, pipeline.timeline
    if timeline.mark:
        timeline.note(MODEL, COMPUTE, step, layer.index, timeline.mark)
        timeline.mark = 0.0
    ready = pipeline.take(layer, query)
    start = perf_counter()
    layer.store_step(key, value)
    timeline.note(MODEL, APPEND, step, layer.index, start)
    layer.attended_all = False
    keep = _use(layer, query, scaling, *ready) if ready else bring(layer, query, scaling)
    pipeline.begin_postponed()
    timeline.mark = perf_counter()
    if keep is None:
        candidates = sum(max(int(n) - slots.pinned, 0) for n in slots.lengths)
        return layer.everything(query, scaling, candidates)
    output = attend(layer, query, scaling)
    layer.pools.settle()
    layer.keeps_slots = keep
    return output


def attend(layer: HierarchicalLayer, query: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attend `query` [B, H, 1, D] to what the layer's slots hold; [B, H, 1, D]."""
    slots = layer.slots
    visible = slots.visible()
    plain = visible is None and layer.softcap is None
    if plain and slots.alone is not None and not query.requires_grad:
        return attend_stored(query, slots.alone, scaling)
    return attend_slots(query, slots.keys, slots.values, scaling, visible, layer.softcap)


def _use(
    layer: HierarchicalLayer, query: torch.Tensor, scaling: float, job: Job, found: Prefetched
) -> bool | None:
    """Put into slots what was prefetched; if the step is sampled, rank as well and fetch what is missing."""
    slots, timeline, start = layer.slots, layer.cache.pipeline.timeline, perf_counter()
    before = slots.ids.copy() if job.sampled else None
    if found.brought is not None:
        for row, brought, uploaded in zip(found.rows, found.brought, found.uploaded, strict=True):
            _place(layer, row, brought, uploaded, final=job.own is not None or not job.sampled)
    timeline.note(MODEL, PLACE, job.step, layer.index, start)
    if before is not None:
        predicted = None
        if job.own is None:
            predicted = slots.ids.copy()
            wanted = [layer.cache.selection_size(int(n), slots) for n in slots.lengths]
            _select(layer, query, wanted, LATE, first=False)
        layer.sample = Sample.of(layer, query, scaling, before, predicted)
    return True


def bring(layer: HierarchicalLayer, query: torch.Tensor, scaling: float) -> bool | None:
    """Rank with the layer's own `query` [B, H, 1, D] and put the winners' rows into its slots. Blocks.

    Returns whether the slots may be kept after the step; None: nothing was brought, attend to everything.
    """
    slots, cache = layer.slots, layer.cache
    if cache.guarantee is not None:
        return True if cache.guarantee.select(layer, query, scaling) else None
    lengths = slots.lengths.tolist()
    wanted = [cache.selection_size(n, slots) for n in lengths]
    most = max(wanted)
    division = cache.divide(slots, most)
    everything = most > 0 and wanted == [max(n - slots.pinned, 0) for n in lengths]
    if not division.fits or (everything and not division.keep_slots):
        # No ranking, a block at a time: exact, in whatever memory there is.
        return None
    slots.resize(most)
    layer.hot.resize(division.hot_rows)
    sampled = cache.pipeline.samples(layer.index) and division.keep_slots
    before = slots.ids.copy() if sampled else None
    _select(layer, query, wanted, EVALUATE)
    if before is not None:
        layer.sample = Sample.of(layer, query, scaling, before, None)
    return division.keep_slots


def _select(
    layer: HierarchicalLayer, query: torch.Tensor, wanted: list[int], name: str, *, first: bool = True
) -> None:
    """Rank the past with this step's query and put the winners' rows into slots; `name` of the span."""
    if not max(wanted):
        return
    slots, pipeline = layer.slots, layer.cache.pipeline
    step, start = pipeline.layers[layer.index].step, perf_counter()
    exact = query[:, :, 0].float().cpu().numpy()
    ranking = layer.cache.predictor.ranking_query(layer.index, exact)
    ends = [n - slots.recent for n in slots.lengths.tolist()]
    rows, asked = items(layer, ranking, wanted, ends, held(layer))
    selections = pipeline.select(layer.index, asked)
    start = pipeline.timeline.note(MODEL, name, step, layer.index, start)
    if selections is not None:
        for row, brought in zip(rows, selections, strict=True):
            _place(layer, row, brought, first=first)
    pipeline.timeline.note(MODEL, PLACE, step, layer.index, start)


def _place(
    layer: HierarchicalLayer,
    row: int,
    brought: Brought,
    uploaded: Uploaded | None = None,
    *,
    first: bool = True,
    final: bool = True,
) -> None:
    """Put a selection into slots. uploaded: its rows on the device.

    first, final: of the sequence's selections in the step, which attends to the final one.
    """
    pools = layer.pools
    if first and final and layer.slots.alone is not None:
        as_told = pools.turn_over(row, brought.ids, brought.missing_per_head, brought.rows)
    else:
        missing = pools.admit(row, brought.ids)
        as_told = missing.counts.tolist() == list(brought.missing_per_head)
        if as_told:
            pools.fill(row, missing.places, brought.rows if uploaded is None else uploaded.ready())
    if not as_told:
        raise CorruptData("the daemon's view of the held tokens differs from the client's")
    layer.cache.count_selected(brought.ids.size if final else 0, len(brought.rows))
