"""Which query ranks the tokens of a layer: the seam for query predictors (APP)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class QueryPredictor(Protocol):
    """Chooses the ranking query of a layer for one decode step."""

    def ranking_query(self, layer: int, exact: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the query to rank with, float32 [batch, heads, head_dim], given the layer's own."""
        ...


class ExactQuery:
    """Ranks with the layer's own query: no loss, on the critical path (design: predictor `exact`)."""

    def ranking_query(self, layer: int, exact: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return `exact` unchanged."""
        return exact
