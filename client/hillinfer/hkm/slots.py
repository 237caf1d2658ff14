"""Slots: the KV that a layer's decode step attends to, on the accelerator.

One buffer a layer: [sinks | recent window (a ring) | selected tokens]. RoPE is
applied before the cache, so order within the buffer does not matter, and a
token once in a slot stays there for as long as it keeps being selected.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from hillinfer.hkm.tensors import to_rows, to_storage
from hillinfer_core.moves import join_rows, split_rows

EMPTY = np.uint32(0xFFFFFFFF)


class Slots:
    """The attended KV of one layer for a batch of sequences. Not thread-safe."""

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, sinks: int, recent: int, like: torch.Tensor
    ) -> None:
        self.sinks = sinks
        self.recent = recent
        self.keys = like.new_zeros((batch, kv_heads, sinks + recent, head_dim))
        self.values = torch.zeros_like(self.keys)
        self.ids = np.full((batch, kv_heads, 0), EMPTY, np.uint32)
        self.full = [True] * batch
        """Of which sequences each slot for a selected token is known to have one."""
        self.lengths = np.zeros(batch, np.int64)  # tokens of each sequence, pinned or not
        self.stored = self._on_host()
        """Keys and values in the storage dtype, not copied; None on an accelerator."""
        self.nbytes = self._count_bytes()
        """Bytes held, the token ids included. Every step asks every layer."""

    @property
    def pinned(self) -> int:
        """Slots that sinks and recent window take."""
        return self.sinks + self.recent

    def _count_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.ids.nbytes

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
        if count == 1:
            place = self._place(start)
            self.keys[row].narrow(1, place, 1).copy_(keys)
            self.values[row].narrow(1, place, 1).copy_(values)
            return
        positions = np.arange(start, start + count)
        positions = positions[(positions < self.sinks) | (positions >= start + count - self.recent)]
        source = torch.from_numpy(positions - start).to(self.keys.device)
        self._put(row, positions, keys.index_select(1, source), values.index_select(1, source))

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
        self.keys = _resized(self.keys, self.pinned + kept, self.pinned + selected)
        self.values = _resized(self.values, self.pinned + kept, self.pinned + selected)
        self.stored = self._on_host()
        self.nbytes = self._count_bytes()

    def take(self, row: int, places: npt.NDArray[np.int64]) -> torch.Tensor:
        """Rows [n, 2, D] of the slots `places` of sequence `row`: a copy.

        Places are those of `ids`, counted through all heads.
        """
        if self.stored is not None:
            keys, values = self.stored
            return to_rows(join_rows(keys[row], values[row], self.pinned, places), self.keys)
        on_device = self._on_device(places)
        return torch.stack([flat.index_select(0, on_device) for flat in self._flat(row)], 1)

    def put(
        self,
        row: int,
        places: npt.NDArray[np.int64],
        rows: npt.NDArray[np.generic] | torch.Tensor,
        which: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Put `rows` [m, 2, D], of the storage dtype or on the device, into the slots `places` [n].

        Those that `which` [n] counts, if it is given. Places are as for `take`.
        """
        if self.stored is not None:
            keys, values = self.stored
            stored = np.ascontiguousarray(to_storage(rows) if isinstance(rows, torch.Tensor) else rows)
            split_rows(stored, which, keys[row], values[row], self.pinned, places)
            return
        kv = rows if which is None else rows[which]
        kv = kv if isinstance(kv, torch.Tensor) else to_rows(kv, self.keys)
        on_device = self._on_device(places)
        for number, flat in enumerate(self._flat(row)):
            flat.index_copy_(0, on_device, kv[:, number])

    def _on_host(self) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]] | None:
        if self.keys.device.type != "cpu":
            return None
        return to_storage(self.keys), to_storage(self.values)

    def _flat(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of sequence `row` through all heads, [Hkv * (pinned + selected), D]; views."""
        dim = self.keys.shape[-1]
        return self.keys[row].view(-1, dim), self.values[row].view(-1, dim)

    def _on_device(self, places: npt.NDArray[np.int64]) -> torch.Tensor:
        """Where in `_flat` places are."""
        flat = places + (places // max(1, self.selected) + 1) * self.pinned
        return torch.from_numpy(flat).to(self.keys.device)

    def visible(self) -> torch.Tensor | None:
        """Which slots hold a token: bool [B, Hkv, pinned + selected], or None when all do."""
        if min(self.lengths.tolist()) >= self.pinned and all(self.full):
            return None
        held = np.minimum(self.lengths, self.pinned)
        pinned = np.arange(self.pinned)[None, None, :] < held[:, None, None]
        pinned = np.broadcast_to(pinned, (*self.ids.shape[:2], self.pinned))
        mask = np.concatenate([pinned, self.ids != EMPTY], axis=-1)
        return torch.from_numpy(mask).to(self.keys.device)


def _resized(buffer: torch.Tensor, kept: int, size: int) -> torch.Tensor:
    resized = buffer.new_zeros((*buffer.shape[:2], size, buffer.shape[3]))
    resized[:, :, :kept] = buffer[:, :, :kept]
    return resized
