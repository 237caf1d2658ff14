"""One paced drive, and HKM on a context that it holds: what every system is measured with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaConfig

from hillinfer.bench.kvpath.workload import F16, Workload
from hillinfer.context import Context
from hillinfer.hkm.cache import HierarchicalCache, HkmConfig
from hillinfer.hkm.policy import SelectionPolicy
from hillinfer.hkm.resident import Division
from hillinfer.hkm.slots import Slots
from hillinfer.pinned import pinned_within
from hillinfer.private_daemon import PrivateDaemon
from hillinfer.session import Session
from hillinfer_core.layout import DType, Precision, Shape
from hillinfer_core.units import Budget

ARENA_BYTES = 16 << 20
"""Shared memory of every system; long reads pass it in pieces, two at a time."""

LEAST_KEY_MEMORY = 4 << 20
"""Of a drive whose evaluation keys are to be streamed: for those that are not written yet."""

_NAME = "kvpath"
_PIECE = 4096  # tokens of an append


@dataclass(frozen=True)
class Rig:
    """A session on the paced drive, whose pool holds the workload's KV as a saved context."""

    session: Session
    workload: Workload
    precision: Precision
    resident: int
    """Bytes that each system may hold."""
    attends: Budget | None = None
    """How much the system that it is given to attends to; None before that is known."""

    def cache(self, budget: Budget, policy: SelectionPolicy, hot_pool: bool = True) -> HierarchicalCache:
        """Return HKM's cache over the saved context, ready to select; with or without a hot pool."""
        shape = self.workload.shape
        config = LlamaConfig(
            num_hidden_layers=self.workload.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )
        kind = HierarchicalCache if hot_pool else _WithoutHotPool
        unit = rows(self.workload, self.precision).append_unit
        asked = HkmConfig(
            budget, self.resident, self.precision, *pinned_within(budget.of(self.workload.tokens), unit)
        )
        cache = kind(self.session, config, asked, policy, base=_NAME)
        like = torch.zeros((1, shape.kv_heads, 1, shape.head_dim), dtype=torch.float16)
        for layer in cache.full_layers:
            layer.lazy_initialization(like, like)
        return cache

    def context(self, kv_heads: int, row_dim: int, dtype: DType = DType.float16) -> Context:
        """Open a context for what a rival stores besides: rows of twice `row_dim` numbers."""
        return self.session.open_context(
            Shape(self.workload.layers, kv_heads, row_dim, dtype, self.precision)
        )


class _WithoutHotPool(HierarchicalCache):
    def divide(self, slots: Slots, selected: int) -> Division:
        return replace(super().divide(slots, selected), hot_rows=0)


def rows(workload: Workload, precision: Precision) -> Shape:
    """Return the shape of the context that holds the workload's KV."""
    shape = workload.shape
    return Shape(workload.layers, shape.kv_heads, shape.head_dim, DType.float16, precision)


@contextmanager
def rig(
    workload: Workload,
    profile: str,
    precision: Precision,
    resident: int,
    pool_dir: Path,
    *,
    keys_in_memory: bool = True,
) -> Iterator[Rig]:
    """Start a daemon with a paced drive in `pool_dir` and fill it with the workload's KV. Blocks."""
    with (
        tempfile.TemporaryDirectory(prefix="hillinfer-kvpath-", dir=pool_dir) as pool,
        PrivateDaemon(
            pool_dir=Path(pool),
            profile=profile,
            evaluation_keys_dram=None if keys_in_memory else LEAST_KEY_MEMORY,
        ) as daemon,
        Session.connect(daemon.socket, arena_bytes=ARENA_BYTES, name="hillinfer bench kvpath") as session,
    ):
        with session.open_context(rows(workload, precision), durable=_NAME) as context:
            append(context, workload.keys, workload.values)
            context.save()
        yield Rig(session, workload, precision, resident)


def append(context: Context, keys: F16, values: F16) -> None:
    """Append [layers, kv_heads, tokens, dim] of both to the context, layer by layer."""
    for layer in range(keys.shape[0]):
        for first in range(0, keys.shape[2], _PIECE):
            piece = slice(first, first + _PIECE)
            context.append(layer, keys[layer, :, piece], values[layer, :, piece])
