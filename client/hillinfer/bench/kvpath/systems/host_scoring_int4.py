"""INT4 keys to the host in every step: HillInfer's arithmetic without a drive that computes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from hillinfer.bench.kvpath.rig import Rig
from hillinfer.bench.kvpath.systems.base import HostSystem, Ids
from hillinfer.context import MirroredKeys
from hillinfer.session import EvaluateItem
from hillinfer_core import kernel
from hillinfer_core.layout import TILE_TOKENS, Reduction
from hillinfer_core.reference import Ranges, Ranked

_PIECE_TOKENS = 8192  # ranked while the next ones are on their way


class NoCsd(HostSystem):
    """Evaluation keys are streamed from NAND and ranked by the host kernel; HKM as for HillInfer."""

    name = "no_csd"
    streams_keys = True

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        self._ahead = ThreadPoolExecutor(1, "hillinfer-kvpath-keys")

    def choose(self, layer: int, item: EvaluateItem) -> Ids:
        """As the drive does, piece by piece, and merged."""
        first = item.first // TILE_TOKENS * TILE_TOKENS
        end = -(-item.end // TILE_TOKENS) * TILE_TOKENS
        starts = range(first, end, _PIECE_TOKENS)
        context, found = item.context, []
        coming = self._ahead.submit(context.fetch_keys, layer, first, min(first + _PIECE_TOKENS, end))
        for start in starts:
            keys = coming.result()
            following = start + _PIECE_TOKENS
            if following < end:
                coming = self._ahead.submit(
                    context.fetch_keys, layer, following, min(following + _PIECE_TOKENS, end)
                )
            found.append(_rank(keys, item, start))
        return kernel.merge(found, item.k).ids

    def close(self) -> None:
        """End the thread."""
        self._ahead.shutdown()


class HostScoringInt4(NoCsd):
    """The same without a hot pool: what was selected last is all that is remembered."""

    name = "host_scoring_int4"
    hot_pool = False


def _rank(keys: MirroredKeys, item: EvaluateItem, start: int) -> Ranked:
    precision = item.context.shape.precision
    # By the scale alone: zero shifts all scores of a head alike.
    quantised = kernel.quantise_query(item.query, Ranges(keys.scale, keys.scale), Reduction.sum)[0]
    end = start + keys.tiles.shape[1] * TILE_TOKENS
    return kernel.rank(
        [keys.tiles], quantised, precision, max(start, item.first), min(end, item.end), item.k, origin=start
    )
