"""The systems: HillInfer, and the caches of transformers that a user would take instead."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from hillinfer.attachment import attach
from hillinfer.bench.decode.pace import Gpu, Pace
from hillinfer.bench.decode.processes import children, cpu_s
from hillinfer.bench.decode.replay import Replay
from hillinfer.bench.decode.stand_in import CountedCache
from hillinfer.bench.decode.subject import Subject, twin
from hillinfer.bench.selections import step
from hillinfer.hkm.cache import HierarchicalCache
from hillinfer.pinned import pinned_within
from hillinfer.pipeline.timeline import MODEL, Span
from hillinfer.prefill import PREFILL_CHUNK, chunks
from hillinfer.private_daemon import PrivateDaemon
from hillinfer.session import Session
from hillinfer_core.layout import Precision
from hillinfer_core.units import parse_budget

WHOLE = 32768
"""Tokens that plain caches read in one pass at most, as `generate` does; longer texts go in pieces too, for
their activations would not fit. Our choice."""

FILL_PIECE = 8192
"""Tokens of made-up KV at a time."""

HILLINFER, DEFAULT, OFFLOADED, ATTENDED = "hillinfer", "default", "offloaded", "attended only"
NAMES = (HILLINFER, DEFAULT, OFFLOADED)


@dataclass(frozen=True)
class Setup:
    """What the systems are measured with.

    held: share of the whole KV that HillInfer may hold besides evaluation keys, 0 to 1. tokens: of a
    sequence, at most.
    """

    subject: Subject
    device: str
    batch: int
    budget: str
    held: float
    tokens: int
    profile: str | None
    predictor: str
    precision: Precision
    pool_dir: Path | None
    trace: Path | None
    replay: Replay | None = None

    def full_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the whole KV at its longest."""
        return self.subject.kv_shape.numbers * dtype.itemsize * self.tokens * self.batch


class System(Protocol):
    """A model with a cache. `feed` and `fill` block until they are done, on the device too."""

    name: str
    dtype: torch.dtype

    def begin(self) -> None:
        """Begin with an empty cache; the one before is freed."""

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Read a text [B, n] and return the next token [B, 1]."""

    def fill(self, tokens: int) -> None:
        """Have the cache hold made-up KV of so many tokens."""

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """Read a question, or one token, [B, n], and return the next token [B, 1]."""

    def spent(self) -> dict[str, float]:
        """Return what was spent so far, by name: seconds end in _s, bytes in _bytes."""

    def held(self) -> dict[str, int]:
        """Return bytes of KV held in memory, by kind."""

    def close(self) -> None:
        """Free everything."""


class Plain:
    """A cache of transformers: everything in the accelerator's memory, or offloaded to the host's."""

    def __init__(self, setup: Setup, name: str, model: PreTrainedModel) -> None:
        self.name, self.dtype = name, model.dtype
        self._setup, self._model = setup, model
        self._cache = DynamicCache()

    def begin(self) -> None:
        """See `System`."""
        offloading = self.name == OFFLOADED
        self._cache = DynamicCache(config=self._setup.subject.config, offloading=offloading)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """See `System`."""
        return in_pieces(self._model, self._cache, ids, WHOLE)

    def fill(self, tokens: int) -> None:
        """See `System`."""
        # A layer at once: an offloaded one is on the host after its update, and takes no more there.
        for layer in range(self._setup.subject.config.num_hidden_layers):
            self._cache.update(*made_up(self._setup, tokens, self.dtype), layer)
        _settle(self._model.device)

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """See `System`."""
        return step(self._model, self._cache, ids)

    def spent(self) -> dict[str, float]:
        """See `System`."""
        return {"client_cpu_s": time.process_time()} | _pace(self._model)

    def held(self) -> dict[str, int]:
        """See `System`."""
        kinds: dict[str, int] = {}
        for layer in self._cache.layers:
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if tensor is not None:
                    kinds[tensor.device.type] = kinds.get(tensor.device.type, 0) + tensor.nbytes
        return kinds

    def close(self) -> None:
        """See `System`."""
        self._cache = DynamicCache()


class Paced(Plain):
    """The same of a stand-in: its cache holds nothing, and attention takes the time of all that it counts."""

    def __init__(self, setup: Setup, name: str, model: PreTrainedModel, gpu: Gpu) -> None:
        super().__init__(setup, name, model)
        if name == DEFAULT:
            gpu.check_room(setup.tokens)
        self.begin()

    def begin(self) -> None:
        """See `System`."""
        self._counted = CountedCache(self._setup.subject.config.num_hidden_layers, self.name == OFFLOADED)

    def fill(self, tokens: int) -> None:
        """See `System`."""
        self._counted.fill(tokens)

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """See `System`."""
        return step(self._model, self._counted, ids)

    def held(self) -> dict[str, int]:
        """See `System`; what it would be."""
        setup = self._setup
        counted = self._counted.get_seq_length()
        where = "cpu" if self.name == OFFLOADED else "gpu"
        return {where: setup.subject.kv_shape.numbers * self.dtype.itemsize * counted * setup.batch}


def plain(setup: Setup, name: str, model: PreTrainedModel) -> Plain:
    """Return the system `name` with one of transformers' caches, or what stands for it under a pace.

    Raises InvalidInput for KV that a paced GPU has no room for.
    """
    gpu = setup.subject.gpu
    return Plain(setup, name, model) if gpu is None else Paced(setup, name, model, gpu)


class HillInfer:
    """HillInfer with a daemon of its own that has room for `copies`, or on the one of another `beside` it."""

    name = HILLINFER

    def __init__(
        self, setup: Setup, model: PreTrainedModel, copies: int = 1, beside: HillInfer | None = None
    ) -> None:
        self.dtype = model.dtype
        self._setup, self._model = setup, model
        self.bare = twin(model)
        full = setup.full_bytes(self.dtype)
        keys = full // 2 * (4 if setup.precision is Precision.int4 else 8) // (8 * self.dtype.itemsize)
        # As little shared memory as long transfers can do with; it counts as held.
        arena = min(64 << 20, max(1 << 20, full // 32))
        self._stack = ExitStack()
        try:
            if beside is None:
                self._daemon = self._stack.enter_context(
                    PrivateDaemon(
                        pool_capacity=copies * (full + full // 4) + (256 << 20),
                        evaluation_keys_dram=copies * 2 * keys,
                        pool_dir=setup.pool_dir,
                        profile=setup.profile,
                    )
                )
            else:
                self._daemon = beside._daemon
            self.session = self._stack.enter_context(
                Session.connect(self._daemon.socket, arena, "hillinfer bench decode")
            )
            unit = setup.subject.kv_shape.append_unit(self.dtype)
            sinks, recent = pinned_within(parse_budget(setup.budget).of(setup.tokens), unit)
            self._attachment = self._stack.enter_context(
                attach(
                    model,
                    session=self.session,
                    budget=setup.budget,
                    sinks=sinks,
                    recent=recent,
                    resident=round(setup.held * full) + keys,
                    precision=setup.precision.value,
                    predictor=setup.predictor,
                    policy=setup.replay,
                    trace=setup.trace is not None,
                )
            )
        except BaseException:
            self._stack.close()
            raise
        self._workers = children(self._daemon.pid)
        self.cache: HierarchicalCache = self._attachment.new_cache()

    def begin(self) -> None:
        """See `System`."""
        self.cache.close()
        self.cache = self._attachment.new_cache()

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """See `System`."""
        return in_pieces(self._model, self.cache, ids, PREFILL_CHUNK)

    def fill(self, tokens: int) -> None:
        """See `System`."""
        like = made_up(self._setup, 1, self.dtype)[0]
        for layer in self.cache.full_layers:
            layer.lazy_initialization(like, like)
            for part in pieces(tokens):
                keys, values = made_up(self._setup, len(part), self.dtype)
                if self._setup.replay is not None:
                    keys[:] = self._setup.replay.keys(layer.index)[:, part.start : part.stop]
                for row in range(self._setup.batch):
                    layer.store(row, keys[row], values[row], layer.slots.recent)
            layer.begin_with(tokens)
        self.cache.account()

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """See `System`."""
        return step(self._model, self.cache, ids)

    def spent(self) -> dict[str, float]:
        """See `System`."""
        counters, tally = self.session.counters, self.cache.tally
        parts = {
            f"{name}_s": seconds
            for (lane, name), seconds in self.cache.pipeline.timeline.sums.items()
            if lane == MODEL
        }
        return (
            _pace(self._model)
            | parts
            | {
                "client_cpu_s": time.process_time(),
                "daemon_cpu_s": cpu_s(self._daemon.pid),
                "drive_cpu_s": sum(map(cpu_s, self._workers)),
                "written_bytes": counters.written_bytes,
                "read_bytes": counters.read_bytes,
                "evaluated_bytes": counters.evaluated_bytes,
                "selected": tally.selected,
                "brought": tally.brought,
            }
        )

    def held(self) -> dict[str, int]:
        """See `System`; at the peak."""
        return dict(self.cache.tally.resident_at_peak)

    @property
    def attended(self) -> int:
        """Tokens that a decode step attends to."""
        return self.cache.full_layers[0].slots.attended

    @property
    def spans(self) -> list[Span]:
        """The trace so far."""
        return self._attachment.trace()

    @property
    def hidden(self) -> float | None:
        """See `Report.hidden_share`."""
        return self.cache.pipeline.timeline.hidden

    def close(self) -> None:
        """See `System`."""
        self._stack.close()


def in_pieces(model: PreTrainedModel, cache: object, ids: torch.Tensor, piece: int) -> torch.Tensor:
    """Read `ids` [B, n], in one pass if they are `piece` tokens at most, else `PREFILL_CHUNK` at a time."""
    tokens, token = ids.shape[1], ids[:, :1]
    for part in chunks(tokens, tokens if 1 < tokens <= piece else PREFILL_CHUNK):
        token = step(model, cache, ids[:, part])
    return token


def made_up(setup: Setup, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normal numbers as keys and values [B, Hkv, tokens, D] on the device."""
    of_token = setup.subject.kv_shape
    shape = (setup.batch, of_token.kv_heads, tokens, of_token.head_dim)
    keys = torch.randn(shape, dtype=dtype, device=setup.device)
    return keys, torch.randn(shape, dtype=dtype, device=setup.device)


def pieces(tokens: int) -> list[range]:
    """Return `tokens` in ranges of `FILL_PIECE` and a rest."""
    return [range(first, min(first + FILL_PIECE, tokens)) for first in range(0, tokens, FILL_PIECE)]


def _pace(model: PreTrainedModel) -> dict[str, float]:
    pace: Pace | None = getattr(model, "pace", None)
    if pace is None:
        return {}
    return {
        "pace_wanted_s": pace.wanted_s, "pace_took_s": pace.took_s,
        "pace_layers": pace.layers, "pace_late": pace.late,
    }  # fmt: skip


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
