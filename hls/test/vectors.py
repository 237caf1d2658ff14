"""Write the shared vectors for the C simulation: inputs, and what ``hillinfer_core.reference`` gives.

``python vectors.py FILE`` writes all cases; testbench.cpp reads them. All numbers are little-endian. A case
is a name (32 bytes, filled with NUL), 12 uint32 (key bits, query bits, heads, key stride in words, tiles,
begin, end, dim, vectors, k, first id, key words), then keys, queries, blocks, histograms and summaries, each
in whole 64-byte words as in evaluate.hpp.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "vectors"))
import evaluation_vectors
from evaluation_vectors import Case

from hillinfer_core import reference

PAIRS = 8


def write_case(file: BinaryIO, case: Case) -> None:
    """Append ``case`` and what it must give to ``file``."""
    heads, vectors, dim = case.q.shape
    words = case.tiles.shape[1] * case.tiles.shape[2] // 64
    file.write(case.name.encode().ljust(32, b"\0"))
    stride = words if case.tiles.shape[0] == heads else 0
    header = (
        case.precision.bits, case.q.itemsize * 8, heads, stride, case.tiles.shape[1], case.begin, case.end,
        dim, vectors, case.k, case.first_id, case.tiles.size // 64,
    )  # fmt: skip
    file.write(np.array(header, "<u4").tobytes())
    file.write(case.tiles.tobytes())
    # What fills up a query's last word is of no account, so it is not zero here.
    in_word = 64 // case.q.itemsize
    padded = np.full((heads, vectors, -(-dim // in_word) * in_word), 77, case.q.dtype)
    padded[:, :, :dim] = case.q
    padded = padded.astype(padded.dtype.newbyteorder("<"))
    first = np.full((heads, 16), 77, "<i4")
    first[:, :vectors] = 0 if case.offsets is None else case.offsets
    for head in range(heads):
        file.write(first[head].tobytes())
        file.write(padded[head].tobytes())

    expected = case.expected()
    assert expected.histogram is not None
    assert expected.checksums is not None
    ids, best = expected.ids, expected.scores
    blocks = np.empty((heads, -(-ids.shape[1] // PAIRS) * PAIRS, 2), "<u4")
    blocks[:] = (0xFFFFFFFF, 0x80000000)
    blocks[:, : ids.shape[1]] = np.stack((ids, best.view(np.uint32)), axis=2)
    file.write(blocks.tobytes())
    file.write(expected.histogram.astype("<u4").tobytes())

    low, shift = reference.score_range(case.q, case.precision, offsets=case.offsets)
    summaries = np.zeros((heads, 16), "<u4")
    summaries[:, 1] = ids.shape[1]
    summaries[:, 2] = expected.checksums[0]
    summaries[:, 3] = low.view(np.uint32)
    summaries[:, 4] = shift
    summaries[:, 5] = best.min(axis=1).view(np.uint32)
    file.write(summaries.tobytes())


def main() -> None:
    """Write all cases to the file that the first argument names."""
    with open(sys.argv[1], "wb") as file:
        for case in (*evaluation_vectors.cases(), *evaluation_vectors.grid()):
            write_case(file, case)


if __name__ == "__main__":
    main()
