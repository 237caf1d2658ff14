"""Which columns of a batch are padding: no token of the context, so columns and tokens differ."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from hillinfer_core.errors import UnsupportedModel

Visible = npt.NDArray[np.bool_]


def _none() -> None:
    """Stand for a reference to no mask."""


class Padding:
    """Padding columns of each sequence of a batch; 4 bytes for each. Not thread-safe."""

    def __init__(self) -> None:
        self._columns: list[npt.NDArray[np.int32]] = []  # of each sequence, ascending
        self._noted = 0  # columns of the latest step, and what was seen with its mask
        self._mask: Callable[[], torch.Tensor | None] = _none
        self._visible: Visible | None = None

    def step(self, mask: torch.Tensor | None, columns: int, new: int) -> Visible | None:
        """Return which of the `new` last columns of a step are tokens, bool [B, new]; None for all.

        mask: bool [B, columns], False for padding, or None. Each layer asks: the first has what is new
        recorded, and those that come with the same mask have the same answer. Raises UnsupportedModel for
        a mask that says otherwise than what is recorded, and for one that ends with padding.
        """
        if mask is not None and self._noted == columns and self._mask() is mask:
            return self._visible
        array = None if mask is None else mask.cpu().numpy()
        if array is not None and array.shape[1] != columns:
            raise UnsupportedModel(
                f"the attention mask has {array.shape[1]} columns and the cache {columns}: give one for all"
            )
        before = 0 if self._noted == columns else new
        if not self.agrees(None if array is None else array[:, : columns - before]):
            raise UnsupportedModel(
                "the attention mask hides tokens that the cache holds, or shows what was padding. That "
                "cannot change later: begin with new_cache(), and give generate() an attention_mask where "
                "the text has padding tokens in it"
            )
        visible = None if array is None else array[:, -new:].copy()
        if visible is not None:
            if not visible[:, -1].all():
                raise UnsupportedModel("the last token of a sequence is padding: pad on the left")
            if before:
                self.note(columns - new, visible)
        self._noted, self._visible = columns, visible
        self._mask = _none if mask is None else weakref.ref(mask)
        return visible

    def note(self, first: int, visible: Visible) -> None:
        """Record columns `first` onwards: `visible` is bool [B, n], False where a column is padding."""
        if visible.all():
            return
        if not self._columns:
            self._columns = [np.zeros(0, np.int32) for _ in visible]
        new = [(first + np.flatnonzero(~row)).astype(np.int32) for row in visible]
        self._columns = [np.concatenate(pair) for pair in zip(self._columns, new, strict=True)]

    def agrees(self, visible: Visible | None) -> bool:
        """Whether a mask says of earlier columns what was recorded. visible: bool [B, n]; None: all."""
        if visible is None:
            return not any(columns.size for columns in self._columns)
        if not self._columns:
            return bool(visible.all())
        pairs = zip(visible, self._columns, strict=True)
        return all(np.array_equal(np.flatnonzero(~row), columns) for row, columns in pairs)

    def tokens(self, row: int, columns: int) -> int:
        """Tokens of sequence `row` in its first `columns` columns."""
        if not self._columns:
            return columns
        return columns - int(np.searchsorted(self._columns[row], columns))

    def crop(self, columns: int) -> None:
        """Forget what is beyond the first `columns` columns."""
        self._columns = [kept[kept < columns] for kept in self._columns]
        self._noted = min(self._noted, columns)
