"""Fixed inputs and the checksums of what they must give: a change here is a new LAYOUT_VERSION.

The inputs come from integer arithmetic alone, so that any implementation, in any language, can make them.
"""

import numpy as np
import pytest

from hillinfer_core import kernel, reference
from hillinfer_core.layout import Precision, Reduction

HEADS, TOKENS, DIM, GROUP = 2, 48, 80, 3

# CRC-32C, of little-endian bytes: tiles, q (sum), offsets (max), scores (sum, max), ids of the 7 best (sum).
EXPECTED = {
    Precision.int8: (0x136822B3, 0x23C4A833, 0x14D9108C, 0x5319F112, 0x6E0D0493, 0x891E495C),
    Precision.int4: (0x8FB66635, 0x23C4A833, 0xE9899C73, 0xB1A82359, 0x4378CC67, 0xBCE7F6C0),
}


def sequence(count, factor, spread):
    """Multiples of 1/64 from -spread/128 to spread/128, exact in float16."""
    return (np.arange(count, dtype=np.int64) * factor % spread - spread // 2).astype(np.float32) / 64


def crc(array):
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return int(reference.row_checksums(little.reshape(1, -1))[0])


@pytest.mark.parametrize("implementation", [reference, kernel])
@pytest.mark.parametrize("precision", Precision)
def test_fixed_vectors(implementation, precision):
    rows = sequence(HEADS * TOKENS * 2 * DIM, 7919, 1009).reshape(HEADS, TOKENS, 2, DIM).astype(np.float16)
    query = sequence(HEADS * GROUP * DIM, 104729, 511).reshape(HEADS * GROUP, DIM)
    ranges = implementation.fit_ranges(implementation.widen_keys(rows) * np.float32(0.75), precision)
    tiles, clipped, nonfinite = implementation.quantise_keys(rows, ranges, precision)
    assert clipped > 0
    assert nonfinite == 0
    found = [crc(tiles)]
    scored = {}
    for reduction in (Reduction.sum, Reduction.max):
        q, offsets, _ = implementation.quantise_query(query, ranges, reduction)
        scored[reduction] = np.empty((HEADS, TOKENS), np.int32)
        implementation.scores(tiles, q, precision, scored[reduction], offsets=offsets)
        found += [crc(q) if reduction is Reduction.sum else crc(offsets)]
    ids, _ = implementation.top_k(scored[Reduction.sum], 7, 0)
    found += [crc(scored[Reduction.sum]), crc(scored[Reduction.max]), crc(ids)]
    assert tuple(found) == EXPECTED[precision]
