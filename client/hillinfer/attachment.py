"""Plugging HKM into a transformers model."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from hillinfer.fingerprint import model_fingerprint
from hillinfer.hkm.cache import HierarchicalCache, HkmConfig
from hillinfer.hkm.coverage import check_model
from hillinfer.hkm.interface import ATTENTION_NAME, register
from hillinfer.hkm.policy import SelectionPolicy
from hillinfer.kv_shape import KvShape
from hillinfer.pinned import LEAST_BY_SHARE, RECENT, SINKS, pinned_within
from hillinfer.pipeline.choice import Predictor
from hillinfer.pipeline.hooks import PredictionHooks
from hillinfer.pipeline.timeline import Span
from hillinfer.report import MassReport, SplitUse
from hillinfer.session import Session
from hillinfer.split.ranking import SplitRanking, parse_cpu_share
from hillinfer_core.errors import InvalidInput, UnsupportedModel
from hillinfer_core.layout import Precision
from hillinfer_core.units import parse_budget, parse_bytes


@dataclass(frozen=True)
class Report:
    """What an attachment did and held, in bytes: its latest cache, and the traffic of its whole session.

    resident lists by kind what was held at the moment of the peak.
    hot_hit_rate: share of the selected tokens found in slots or hot pool, or
    None before anything was selected. mass: of guarantee mode, None without.
    predictors: how many layers use which predictor now. hidden_share: of the time of
    evaluation and fetch (`hidden_share`), 0 to 1, None before any. split: of `cpu_share`, None without.
    """

    full_bytes: int
    resident_peak_bytes: int
    resident: dict[str, int]
    cold_written_bytes: int
    cold_read_bytes: int
    evaluated_bytes: int
    hot_hit_rate: float | None
    mass: MassReport | None = None
    predictors: dict[str, int] = field(default_factory=dict)
    hidden_share: float | None = None
    split: SplitUse | None = None


class Attachment:
    """A model whose KV lives in the cold pool. Close it with `detach` or use it as a context manager."""

    def __init__(
        self,
        model: PreTrainedModel,
        session: Session,
        config: HkmConfig,
        policy: SelectionPolicy | None,
        owns_session: bool,
        hooks: PredictionHooks | None = None,
        trace: bool = False,
    ) -> None:
        register()
        self.session = session
        self.model = model
        self._config = config
        self._policy = policy
        self._owns_session = owns_session
        self._last: HierarchicalCache | None = None
        self._caches: weakref.WeakSet[HierarchicalCache] = weakref.WeakSet()
        self._replaced: weakref.WeakKeyDictionary[DynamicCache, HierarchicalCache]
        self._replaced = weakref.WeakKeyDictionary()
        """Caches of callers, and those that took their places."""
        self._attached = True
        self._previous = model.config._attn_implementation
        model.set_attn_implementation(ATTENTION_NAME)
        self._hook = model.register_forward_pre_hook(self._swap_cache, with_kwargs=True)
        self._predictions = hooks
        self._trace = trace

    def new_cache(
        self,
        *,
        durable: str | None = None,
        base: str | None = None,
        owner: str | int | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> HierarchicalCache:
        """Return a cache for one batch, to pass as `past_key_values` over several turns.

        It begins empty; with `durable`, a name, its one sequence can be kept
        with `HierarchicalCache.save`; with `base`, the name of a kept one, it
        begins with all tokens of it (of another `owner` where their group lets this
        user read it). `labels` say what the context is made
        from, for example {"text": tokens_fingerprint(ids)}, and must be the
        same ones each time; the model's fingerprint and dtype go with them.

        Raises UnsupportedModel for a name and a model with sliding-window
        layers, UnknownContext, and ContextMismatch naming what differs. A name
        for `durable` that is taken is refused at the first step.
        """
        text = self.model.config.get_text_config(decoder=True)
        if durable is not None or base is not None:
            model, dtype = model_fingerprint(self.model), str(self.model.dtype).removeprefix("torch.")
            labels = {**(labels or {}), "model": model, "dtype": dtype}
        self._last = HierarchicalCache(
            self.session,
            text,
            self._config,
            self._policy,
            durable=durable,
            base=base,
            owner=owner,
            labels=labels,
        )
        if self._trace:
            self._last.pipeline.timeline.spans = []
        self._caches.add(self._last)
        return self._last

    @property
    def last_cache(self) -> HierarchicalCache | None:
        """The latest cache; None before any, and once detached."""
        return self._last

    def trace(self) -> list[Span]:
        """Return the spans of the latest cache's decode steps so far; empty without `trace`."""
        return list(self._last.pipeline.timeline.spans or ()) if self._last else []

    def report(self) -> Report:
        """Report on the latest cache and the session's traffic."""
        cache, counters = self._last, self.session.counters
        tally = cache.tally if cache else None
        return Report(
            full_bytes=cache.full_bytes() if cache else 0,
            resident_peak_bytes=tally.resident_peak if tally else 0,
            resident=dict(tally.resident_at_peak) if tally else {},
            cold_written_bytes=counters.written_bytes,
            cold_read_bytes=counters.read_bytes,
            evaluated_bytes=counters.evaluated_bytes,
            hot_hit_rate=1 - tally.brought / tally.selected if tally and tally.selected else None,
            mass=cache.guarantee.report() if cache and cache.guarantee else None,
            predictors=dict(Counter(s.predictor.value for s in cache.pipeline.layers)) if cache else {},
            hidden_share=cache.pipeline.timeline.hidden if cache else None,
            split=_split_use(cache.policy) if cache else None,
        )

    def detach(self) -> None:
        """Give the model its own attention back and free what the caches hold; idempotent."""
        if not self._attached:
            return
        self._attached = False
        self._hook.remove()
        if self._predictions is not None:
            self._predictions.close()
        self.model.set_attn_implementation(self._previous)
        for cache in list(self._caches):
            cache.close()
        self._last = None
        if self._owns_session:
            self.session.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _swap_cache(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put our cache in the place of the empty default one that `generate` makes."""
        past = kwargs.get("past_key_values")
        if kwargs.get("use_cache", True) is False and not isinstance(past, HierarchicalCache):
            return args, kwargs
        given = kwargs.get("inputs_embeds")
        needing = module.parameters() if given is None else (given, *module.parameters())
        if torch.is_grad_enabled() and any(each.requires_grad for each in needing):
            raise InvalidInput(
                "no gradient flows through a cold pool: call the model within torch.no_grad() or "
                "torch.inference_mode(), as generate() does"
            )
        if isinstance(past, HierarchicalCache):
            past.check_whole()
            return args, kwargs
        if past is None or (isinstance(past, DynamicCache) and past.get_seq_length() == 0):
            before = None if past is None else self._replaced.get(past)
            if before is not None and before.get_seq_length():
                raise InvalidInput(
                    "another cache took the place of this DynamicCache, and has its tokens: pass on the "
                    "step's past_key_values, or one of new_cache(); to begin anew, make another"
                )
            cache = self.new_cache()
            if past is not None:
                self._replaced[past] = cache
            if past is not None and any(getattr(layer, "record_past", False) for layer in past.layers):
                cache.activate_past_recording()  # type: ignore[no-untyped-call]  # untyped there
            kwargs["past_key_values"] = cache
            return args, kwargs
        raise UnsupportedModel(
            f"cannot go on with a {type(past).__name__} that holds tokens: begin with new_cache()"
        )


def attach(
    model: PreTrainedModel,
    *,
    session: Session | None = None,
    socket: Path | None = None,
    budget: str | int | None = None,
    min_mass: float | None = None,
    resident: str | int = "64MiB",
    precision: str | None = None,
    sinks: int | None = None,
    recent: int | None = None,
    policy: SelectionPolicy | None = None,
    predictor: str = "auto",
    cpu_share: str | float | None = None,
    trace: bool = False,
) -> Attachment:
    """Keep the model's KV cache in the cold pool; `model.generate` then works unchanged.

    Called by itself, the model wants `torch.no_grad()` or `torch.inference_mode()`.

    budget: tokens attended per decode step (a count, or per cent of the past;
    while a context is short, a per cent means at least 72 tokens or, with pinned tokens of your
    own, these; 2% by default). sinks, recent: of these, the first and the latest tokens, which every step
    attends to: by default 4 and 32, and fewer where a number of tokens is small (`pinned_within`).
    min_mass: instead of a budget, attend at each step to
    as many tokens as hold at least this share of the attention of every query
    head: a bound with INT8 keys, an estimate with INT4 (docs/guarantee.md;
    `Report.mass` says what was reached). resident: bytes of DRAM and accelerator memory for the KV of each
    cache, client and daemon together. precision: of the evaluation keys, "int8" or
    "int4" (the default, but for min_mass).
    predictor: the query that ranks the tokens of a step, see `Predictor`;
    "auto" chooses for each layer by measured times, so that two runs may attend to different tokens, and
    means "exact" for models whose layers it does not know.
    cpu_share: of the tokens, the newer ones, that the CPU ranks while the drive ranks the others: 0 to 1,
    or "auto" for as many as it takes to finish together (docs/split.md); no selection changes by it. Their
    keys are held in memory besides, within `resident`.
    trace: keep the spans of decode steps for `Attachment.trace`.
    session: an open Session; else one is made on `socket` (default: the
    system's daemon) and closed by `detach`.

    Raises UnsupportedModel, BudgetTooSmall, InvalidInput, DaemonUnavailable.
    """
    if precision is None:
        precision = "int4" if min_mass is None else "int8"
    try:
        key_precision = Precision(precision)
    except ValueError:
        raise UnsupportedModel(f"precision {precision!r} is not known: int8 or int4") from None
    try:
        chosen = Predictor(predictor)
    except ValueError:
        raise InvalidInput(f"predictor {predictor!r} is not known: {', '.join(Predictor)}") from None
    if min_mass is not None and chosen not in (Predictor.auto, Predictor.exact):
        raise InvalidInput(f"min_mass needs the exact query: leave out predictor={chosen.value!r}")
    if cpu_share is not None and (min_mass is not None or policy is not None):
        raise InvalidInput("cpu_share divides a ranking by budget: give no policy or min_mass with it")
    if min_mass is not None and (budget is not None or policy is not None):
        raise InvalidInput(
            "min_mass decides how many tokens are attended and which: give no budget or policy"
        )
    _check(model)
    asked = parse_budget("2%" if budget is None else budget)
    pinned, own = (SINKS, RECENT), sinks is not None and recent is not None
    if asked.tokens is not None and not own:
        shape = KvShape.of(model.config.get_text_config(decoder=True))
        pinned = pinned_within(asked.tokens, shape.append_unit(model.dtype))
    config = HkmConfig(
        asked,
        parse_bytes(resident),
        key_precision,
        pinned[0] if sinks is None else sinks,
        pinned[1] if recent is None else recent,
        min_mass,
        chosen,
        None if cpu_share is None else parse_cpu_share(cpu_share),
        LEAST_BY_SHARE if asked.tokens is None and not own else 0,
    )
    hooks = None
    try:
        hooks = PredictionHooks(model)
    except UnsupportedModel:
        if chosen is Predictor.next_layer:
            raise
        config = replace(config, predictor=Predictor.exact if chosen is Predictor.auto else chosen)
    owns = session is None
    try:
        return Attachment(model, session or Session.connect(socket), config, policy, owns, hooks, trace)
    except BaseException:
        if hooks is not None:
            hooks.close()
        raise


def _split_use(policy: SelectionPolicy) -> SplitUse | None:
    if not isinstance(policy, SplitRanking):
        return None
    found = policy.report()
    return SplitUse(
        found.cpu_tokens / found.tokens if found.tokens else 0.0,
        median(found.measured_imbalance.values()) if found.measured_imbalance else None,
        dict(Counter(each.stop.value for each in found.boundaries.values())),
    )


def _check(model: PreTrainedModel) -> None:
    if model.config._attn_implementation == ATTENTION_NAME:
        raise InvalidInput(f"this {type(model).__name__} is attached already: detach it first")
    check_model(model)
