"""INT4 keys to the host in every step: HillInfer's arithmetic without a drive that computes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from hillinfer.bench.kvpath.rig import Rig
from hillinfer.bench.kvpath.systems.base import HostSystem, Ids
from hillinfer.keys import MirroredKeys
from hillinfer.session import EvaluateItem
from hillinfer_core import kernel
from hillinfer_core.layout import TILE_TOKENS, Reduction
from hillinfer_core.reference import Ranges

_PIECE_TOKENS = 16384  # 8 MiB of keys at the 8B shape, a block of `rank_blocks`


class NoCsd(HostSystem):
    """Evaluation keys are streamed from NAND and ranked by the host kernel; HKM as for HillInfer."""

    name = "no_csd"

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        self._ahead = ThreadPoolExecutor(1, "hillinfer-kvpath-keys")

    def choose(self, layer: int, item: EvaluateItem) -> Ids:
        """As the drive does, block by block as the keys come, and merged."""
        first = item.first // TILE_TOKENS * TILE_TOKENS
        pieces = self._pieces(layer, item, first)
        head = next(pieces)
        precision = item.context.shape.precision
        # By the scale alone: zero shifts all scores of a head alike.
        ranges = Ranges(head.scale, head.scale)
        q, _, _ = kernel.quantise_query(item.query, ranges, Reduction.sum)
        parts = (keys.tiles for keys in chain([head], pieces))
        found = list(kernel.rank_blocks(parts, q, precision, item.first, item.end, item.k, origin=first))
        return kernel.merge(found, item.k).ids

    def _pieces(self, layer: int, item: EvaluateItem, first: int) -> Iterator[MirroredKeys]:
        """Yield the keys from token `first` on, the next piece on its way while the last is ranked."""
        end = -(-item.end // TILE_TOKENS) * TILE_TOKENS

        def fetch(start: int) -> MirroredKeys:
            return item.context.fetch_keys(layer, start, min(start + _PIECE_TOKENS, end))

        coming = self._ahead.submit(fetch, first)
        for start in range(first, end, _PIECE_TOKENS):
            keys = coming.result()
            if start + _PIECE_TOKENS < end:
                coming = self._ahead.submit(fetch, start + _PIECE_TOKENS)
            yield keys

    def close(self) -> None:
        """End the thread."""
        self._ahead.shutdown()


class HostRanking(NoCsd):
    """All INT4 keys stay in the host's memory, as in the card's for HillInfer; the host ranks them."""

    name = "host_ranking"
    keys_in_memory = True

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        self._kept: dict[int, list[MirroredKeys]] = {}

    def _pieces(self, layer: int, item: EvaluateItem, first: int) -> Iterator[MirroredKeys]:
        if layer not in self._kept:
            self._kept[layer] = list(super()._pieces(layer, item, first))
        return iter(self._kept[layer])


class HostScoringInt4(NoCsd):
    """The same without a hot pool: what was selected last is all that is remembered."""

    name = "host_scoring_int4"
    hot_pool = False
