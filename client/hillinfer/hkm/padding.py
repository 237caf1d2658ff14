"""Which columns of a batch are padding: no token of the context, so columns and tokens differ."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class Padding:
    """Padding columns of each sequence of a batch; 4 bytes for each. Not thread-safe."""

    def __init__(self) -> None:
        self._columns: list[npt.NDArray[np.int32]] = []  # of each sequence, ascending

    def note(self, first: int, visible: npt.NDArray[np.bool_]) -> None:
        """Record columns `first` onwards: `visible` is bool [B, n], False where a column is padding."""
        if visible.all():
            return
        if not self._columns:
            self._columns = [np.zeros(0, np.int32) for _ in visible]
        new = [(first + np.flatnonzero(~row)).astype(np.int32) for row in visible]
        self._columns = [np.concatenate(pair) for pair in zip(self._columns, new, strict=True)]

    def agrees(self, visible: npt.NDArray[np.bool_] | None) -> bool:
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
