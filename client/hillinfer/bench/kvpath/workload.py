"""Layers of a large model's shape whose selections are those that the bundled model made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hillinfer.bench.kvpath.recording import Recording
from hillinfer_core.errors import InvalidInput

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerShape:
    """Heads and head dimension of one attention layer, and how many there are in the whole model."""

    kv_heads: int
    heads: int
    head_dim: int
    model_layers: int


SHAPES = {
    # Llama-3.1-8B and Llama-3.2-1B: their published configurations.
    "8b": LayerShape(kv_heads=8, heads=32, head_dim=128, model_layers=32),
    "1b": LayerShape(kv_heads=8, heads=32, head_dim=64, model_layers=16),
}


@dataclass(frozen=True)
class Workload:
    """What every system is given: KV of `layers` layers, and queries step by step.

    keys, values: float16 [layers, kv_heads, tokens, head_dim]; queries: float32
    [steps, layers, heads, head_dim].
    """

    shape: LayerShape
    keys: F16
    values: F16
    queries: F32

    @property
    def tokens(self) -> int:
        """Tokens of the context."""
        return int(self.keys.shape[2])

    @property
    def layers(self) -> int:
        """Layers that are measured."""
        return int(self.keys.shape[0])


def make_workload(recording: Recording, shape: LayerShape, seed: int) -> Workload:
    """Deal the recorded KV heads to layers of `shape`; each keeps its own queries.

    Channels beyond the recorded ones hold seeded noise that the queries do not see (they are zero
    there), and so do values: rankings and what they share from step to step are the recorded model's, bytes
    and arithmetic those of the shape. Raises InvalidInput for a shape that the recording does not fill.
    """
    layers, kv_heads, tokens, dim = recording.keys.shape
    steps, _, heads, _ = recording.queries.shape
    group = heads // kv_heads
    streams = layers * kv_heads
    if shape.heads != group * shape.kv_heads or streams % shape.kv_heads or dim > shape.head_dim:
        raise InvalidInput(
            f"{streams} recorded KV heads with {group} query heads each do not make layers of "
            f"{shape.kv_heads} KV heads with {shape.heads // shape.kv_heads}"
        )
    rng = np.random.default_rng(seed)
    made = streams // shape.kv_heads
    size = (made, shape.kv_heads, tokens, shape.head_dim)
    keys, values = (rng.standard_normal(size, np.float32).astype(np.float16) for _ in range(2))
    keys[..., :dim] = recording.keys.reshape(made, shape.kv_heads, tokens, dim)
    queries = np.zeros((steps, made, shape.heads, shape.head_dim), np.float32)
    queries[..., :dim] = recording.queries.reshape(steps, made, shape.heads, dim)
    return Workload(shape, keys, values, queries)
