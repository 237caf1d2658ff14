"""What the policies to compare against are built on.

They run on HKM's own seams, `SelectionPolicy` and `QueryPredictor`, so that
all share slots, pinned tokens, budget and exact prefill, and differ in what they
choose alone. They are for comparing *accuracy*: several keep a float32 copy of
all keys in the client, uncounted, which no deployment would. One sequence at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from hillinfer.context import Context
from hillinfer.session import Brought, EvaluateItem, Session
from hillinfer_core.layout import DType

if TYPE_CHECKING:
    from hillinfer.hkm.cache import HierarchicalCache, HkmConfig
    from hillinfer.hkm.query import QueryPredictor

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.uint32]

_SLACK = 256  # tokens that a copy has room for beyond those it holds, so that it is not moved at every step


class KeyCopy:
    """A float32 copy of the keys of one context, read from the cold pool as it grows."""

    def __init__(self) -> None:
        self._layers: dict[int, F32] = {}
        self._held: dict[int, int] = {}

    def keys(self, context: Context, layer: int, end: int) -> F32:
        """Return the keys of tokens 0 .. end-1, float32 [kv_heads, end, head_dim]. Blocks."""
        held = self._held.get(layer, 0)
        if held < end:
            buffer = self._layers.get(layer)
            if buffer is None or buffer.shape[1] < end:
                grown = np.empty((context.shape.kv_heads, end + _SLACK, context.shape.head_dim), np.float32)
                if buffer is not None:
                    grown[:, :held] = buffer[:, :held]
                self._layers[layer] = buffer = grown
            rows = context.fetch_range(layer, held, end - held)[:, :, 0]
            buffer[:, held:end] = _as_float(rows, context.shape.dtype)
            self._held[layer] = end
        return self._layers[layer][:, :end]


def all_keys(copy: KeyCopy, cache: HierarchicalCache, layer: int) -> F32:
    """Return the keys of every token of a layer, those that only wait in the recent window too. Blocks."""
    cache.full_layers[layer].append_window()
    context = cache.contexts[0]
    return copy.keys(context, layer, context.length(layer))


@dataclass
class Reading:
    """What the exact reading of a context left behind, by layer.

    tokens: read. scaling, softcap: of the attention scores. last_query: float32 [H, D] of
    the last token. mass: float32 [Hkv, tokens], the attention that each token got
    from all queries and the heads of its group; empty where no policy asked for it.
    """

    tokens: int
    scaling: dict[int, float] = field(default_factory=dict)
    softcap: dict[int, float | None] = field(default_factory=dict)
    last_query: dict[int, F32] = field(default_factory=dict)
    mass: dict[int, F32] = field(default_factory=dict)


class Comparison(ABC):
    """A policy for one context and one budget: a `SelectionPolicy`, and what it needs besides.

    Made once the context has been read. Use it as a context manager: some hook
    into the model.
    """

    name: ClassVar[str]
    evicts: ClassVar[bool] = False
    """What it drops never comes back: later questions must not see it either."""
    needs_mass: ClassVar[bool] = False
    """It begins with `Reading.mass`."""

    def __init__(self, model: Any, reading: Reading) -> None:
        self.reading = reading

    @property
    def predictor(self) -> QueryPredictor | None:
        """The query to rank with; None for the layer's own."""
        return None

    def config(self, config: HkmConfig) -> HkmConfig:
        """Return what the cache is to be configured with, given what was asked for."""
        return config

    @abstractmethod
    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought] | None:
        """See `SelectionPolicy.select`."""

    def observe(self, cache: HierarchicalCache, layer: int, query: torch.Tensor, scaling: float) -> None:  # noqa: B027
        """See `hillinfer.hkm.cache.Observer`."""

    def close(self) -> None:  # noqa: B027
        """Let go of the model."""

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class HostPolicy(Comparison):
    """Chooses in the client, on its copy of the keys. A subclass says which tokens."""

    def __init__(self, model: Any, reading: Reading) -> None:
        super().__init__(model, reading)
        self.copy = KeyCopy()

    @abstractmethod
    def choose(self, layer: int, item: EvaluateItem, keys: F32) -> Ids:
        """Return uint32 [kv_heads, at most item.k], ascending, of item.first .. item.end-1.

        keys: float32 [kv_heads, tokens, head_dim], of all tokens so far.
        """

    def select(self, session: Session, layer: int, items: Sequence[EvaluateItem]) -> list[Brought]:
        """Choose, and fetch the rows that slots and hot pool lack."""
        return [self._select(layer, item) for item in items]

    def _select(self, layer: int, item: EvaluateItem) -> Brought:
        ids = self.choose(layer, item, self.copy.keys(item.context, layer, item.context.length(layer)))
        missing = [wanted[~np.isin(wanted, held)] for wanted, held in zip(ids, item.held, strict=True)]
        rows = item.context.fetch_rows(layer, missing)
        return Brought(ids, [len(each) for each in missing], rows, 0, 0, 0)


def group_sum(query: F32, keys: F32) -> F32:
    """Products of `query` [H, D] and `keys` [Hkv, n, D], summed over each group of heads: [Hkv, n]."""
    grouped = query.reshape(len(keys), -1, query.shape[-1]).sum(axis=1)
    products: F32 = np.einsum("hnd,hd->hn", keys, grouped)
    return products


def attention_mass(query: F32, keys: F32, scaling: float, softcap: float | None = None) -> F32:
    """Softmax over all `keys` [Hkv, n, D] for each query head of `query` [H, D]: [Hkv, group, n].

    softcap: of the scores, as the model has it (`HierarchicalLayer.softcap`).
    """
    grouped = query.reshape(len(keys), -1, query.shape[-1])
    scores = np.matmul(grouped, keys.transpose(0, 2, 1)) * np.float32(scaling)
    if softcap is not None:
        scores = np.tanh(scores / np.float32(softcap)) * np.float32(softcap)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mass: F32 = weights / weights.sum(axis=-1, keepdims=True)
    return mass


def best(scores: F32, item: EvaluateItem) -> Ids:
    """Return the `item.k` tokens of the highest `scores` [Hkv, tokens] within its range, ascending."""
    ranked = scores[:, item.first : item.end]
    chosen = np.argpartition(-ranked, item.k - 1, axis=-1)[:, : item.k]
    return (np.sort(chosen, axis=-1) + item.first).astype(np.uint32)


def _as_float(rows: npt.NDArray[Any], dtype: DType) -> npt.NDArray[Any]:
    if dtype is DType.bfloat16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows
