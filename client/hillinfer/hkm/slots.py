"""Slots: the KV that a layer's decode step attends to, on the accelerator.

One buffer a layer: [sinks | recent window (a ring) | selected tokens]. RoPE is
applied before the cache, so order within the buffer does not matter, and a
token once in a slot stays there for as long as it keeps being selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hillinfer.hkm.attention import ALONE_BYTES
from hillinfer.hkm.staging import Rows, on_accelerator, to_device, to_host
from hillinfer.hkm.tensors import to_storage
from hillinfer_core.attend import Attended
from hillinfer_core.moves import SlotArrays, join_rows, put_tokens, split_rows

EMPTY = np.uint32(0xFFFFFFFF)


def _zeros(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    # A tensor of inference_mode could not be changed by `generate`, which runs without.
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


class Slots:
    """The attended KV of one layer for a batch of sequences. Not thread-safe."""

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, sinks: int, recent: int, like: torch.Tensor
    ) -> None:
        self.sinks = sinks
        self.recent = recent
        self._kv = _zeros(like, (2, batch, kv_heads, sinks + recent, head_dim))
        self.keys, self.values = self._kv
        self.ids = np.full((batch, kv_heads, 0), EMPTY, np.uint32)
        self.full = [True] * batch
        """Of which sequences each slot for a selected token is known to have one."""
        self.lengths = np.zeros(batch, np.int64)  # tokens of each sequence, pinned or not
        self._note_memory()

    def _note_memory(self) -> None:
        self.stored = self._on_host()
        """Keys and values in the storage dtype, not copied; None on an accelerator."""
        self.arrays: list[SlotArrays] = []
        """Of each sequence; none on an accelerator."""
        self.nbytes: int = self._kv.nbytes + self.ids.nbytes
        """Bytes held, the token ids included. Every step asks every layer."""
        self.alone: Attended | None = None
        """What the thread that asks attends to itself; None where more is to be done for it."""
        if self.stored is None:
            return
        self.arrays = [SlotArrays.of(*each, self.pinned) for each in zip(self.ids, *self.stored, strict=True)]
        if self.nbytes <= ALONE_BYTES:
            keys, values = self.stored
            flat = -1, *keys.shape[2:]
            self.alone = Attended.of(keys.reshape(flat), values.reshape(flat))

    @property
    def pinned(self) -> int:
        """Slots that sinks and recent window take."""
        return self.sinks + self.recent

    @property
    def selected(self) -> int:
        """Slots for selected tokens, for each sequence and KV head."""
        return int(self.ids.shape[-1])

    @property
    def attended(self) -> int:
        """Tokens that a decode step of the shortest sequence attends to, when all slots are in use."""
        return min(self.pinned + self.selected, *self.lengths.tolist())

    def append(self, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens [Hkv, n, D] at the end of sequence `row`; older ones leave the window."""
        count = keys.shape[1]
        start = int(self.lengths[row])
        self.lengths[row] = start + count
        positions = np.arange(start, start + count)
        positions = positions[(positions < self.sinks) | (positions >= start + count - self.recent)]
        source = torch.from_numpy(positions - start).to(self.keys.device)
        self._put(row, positions, keys.index_select(1, source), values.index_select(1, source))

    def append_step(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add one token [B, Hkv, 1, D] at the end of each sequence; the oldest leave the windows."""
        places = []
        for row, tokens in enumerate(self.lengths.tolist()):
            places.append(self._place(tokens))
            self.lengths[row] = tokens + 1
        if self.stored is not None:
            put_tokens(*self.stored, to_storage(keys), to_storage(values), places)
            return
        for row, place in enumerate(places):
            self.keys[row].narrow(1, place, 1).copy_(keys[row])
            self.values[row].narrow(1, place, 1).copy_(values[row])

    def crop(self, row: int, tokens: int) -> tuple[int, int]:
        """Drop all but the first `tokens` tokens of sequence `row`, and what is selected among the dropped.

        Returns (first, count) of the tokens that the recent window has back and
        whose rows it lacks: the caller gives them to `refill`.
        """
        window = max(int(self.lengths[row]) - self.recent, self.sinks)
        first = max(tokens - self.recent, self.sinks)
        self.lengths[row] = tokens
        # What is in the window again must not be attended twice.
        ids = self.ids[row]
        ids[ids >= max(tokens - self.recent, 0)] = EMPTY
        self.full[row] = not self.selected
        return first, max(min(tokens, window) - first, 0)

    def refill(self, row: int, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put back pinned tokens `first` onwards, [Hkv, n, D], of sequence `row`."""
        self._put(row, np.arange(first, first + keys.shape[1]), keys, values)

    def pinned_rows(self, row: int, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [Hkv, count, D] of tokens `first` onwards, which must be pinned ones."""
        places = self._places(np.arange(first, first + count))
        return self.keys[row].index_select(1, places), self.values[row].index_select(1, places)

    def _put(
        self, row: int, positions: npt.NDArray[np.int64], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        places = self._places(positions)
        self.keys[row].index_copy_(1, places, keys)
        self.values[row].index_copy_(1, places, values)

    def _places(self, positions: npt.NDArray[np.int64]) -> torch.Tensor:
        """Where pinned tokens are: sinks first, the window as a ring after them."""
        places = np.where(
            positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.recent
        )
        return torch.from_numpy(places).to(self.keys.device)

    def _place(self, position: int) -> int:
        """As `_places`, of one token."""
        return position if position < self.sinks else self.sinks + (position - self.sinks) % self.recent

    def pinned_part(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [Hkv, n, D] of the sinks and the recent window of sequence `row`, in no order."""
        held = min(int(self.lengths[row]), self.pinned)
        return self.keys[row, :, :held], self.values[row, :, :held]

    def resize(self, selected: int) -> None:
        """Make room for `selected` tokens besides the pinned ones, keeping what still fits."""
        if selected == self.selected:
            return
        kept = min(selected, self.selected)
        grown = self.ids[..., :kept]
        pad = np.full((*self.ids.shape[:2], selected - kept), EMPTY, np.uint32)
        self.ids = np.concatenate([grown, pad], axis=-1)
        self.full = [not selected] * len(self.full)
        held = self._kv[..., : self.pinned + kept, :]
        self._kv = _zeros(held, (*held.shape[:3], self.pinned + selected, held.shape[-1]))
        self._kv[..., : held.shape[3], :] = held
        self.keys, self.values = self._kv
        self._note_memory()

    def take(self, row: int, places: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Rows [n, 2, D] of the slots `places` of sequence `row`: a copy, of the storage dtype.

        Places are those of `ids`, counted through all heads.
        """
        if self.stored is not None:
            keys, values = self.stored
            return join_rows(keys[row], values[row], self.pinned, places)
        return self.swap(row, places, places[:0], [])()

    def put(self, row: int, places: npt.NDArray[np.int64], rows: Rows | torch.Tensor) -> None:
        """Put `rows` [n, 2, D], of the storage dtype or on the device, into the slots `places` [n].

        Places are as for `take`.
        """
        if self.stored is not None:
            keys, values = self.stored
            stored, which = Rows(to_storage(rows)) if isinstance(rows, torch.Tensor) else rows
            split_rows(np.ascontiguousarray(stored), keys[row], values[row], self.pinned, places, which)
        elif isinstance(rows, torch.Tensor):
            (there,) = to_device([[self._flat(row, places)]], self._kv.device)
            self._rows.index_copy_(0, there.view(torch.int64), rows.reshape(-1, rows.shape[2]))
        else:
            self.swap(row, places[:0], places, [rows])

    def swap(
        self,
        row: int,
        taken: npt.NDArray[np.int64],
        placed: npt.NDArray[np.int64],
        rows: Sequence[Rows],
    ) -> Callable[[], npt.NDArray[Any]]:
        """On an accelerator: copy the slots `taken` [n] to the host, then put `rows` into those `placed`.

        rows: of the storage dtype, [m, 2, D] in all. Waits for nothing; the function returned waits for the
        rows [n, 2, D] that were taken. Places are as for `take`.
        """
        groups = [self._flat(row, taken)], [self._flat(row, placed)], rows
        at, into, kv = to_device(groups, self._kv.device)
        flat, dim = self._rows, self._kv.shape[-1]
        left = to_host(flat.index_select(0, at.view(torch.int64)).view(-1, 2, dim))
        if len(placed):
            flat.index_copy_(0, into.view(torch.int64), kv.view(flat.dtype).view(-1, dim))
        return left

    def _on_host(self) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]] | None:
        if on_accelerator(self.keys):
            return None
        return to_storage(self.keys), to_storage(self.values)

    @property
    def _rows(self) -> torch.Tensor:
        """All keys, then all values, [2 * B * Hkv * (pinned + selected), D]; a view."""
        return self._kv.view(-1, self._kv.shape[-1])

    def _flat(self, row: int, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where in `_rows` places are: [n, 2], key and value of each."""
        of_head = places + (places // max(1, self.selected) + 1) * self.pinned
        first = of_head + row * self.keys[0].shape[0] * self.keys.shape[2]
        return np.stack([first, first + self.keys[..., 0].numel()], axis=1)

    def visible(self) -> torch.Tensor | None:
        """Which slots hold a token: bool [B, Hkv, pinned + selected], or None when all do."""
        if min(self.lengths.tolist()) >= self.pinned and all(self.full):
            return None
        held = np.minimum(self.lengths, self.pinned)
        pinned = np.arange(self.pinned)[None, None, :] < held[:, None, None]
        pinned = np.broadcast_to(pinned, (*self.ids.shape[:2], self.pinned))
        mask = np.concatenate([pinned, self.ids != EMPTY], axis=-1)
        return torch.from_numpy(mask).to(self.keys.device)
