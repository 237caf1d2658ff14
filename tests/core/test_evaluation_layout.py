"""The layout of evaluation keys and rows, checked byte by byte against its written definition."""

import numpy as np
import pytest

from hillinfer_core import kernel, reference
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import PAGE, TILE_TOKENS, DType, Precision, Reduction, Shape, tile_bytes
from hillinfer_core.reference import Ranges


def levels_as_rows(levels):
    """Rows whose keys quantise to exactly `levels` under a scale of 1 and a zero of 0."""
    rows = np.zeros((*levels.shape[:2], 2, levels.shape[2]), np.float32)
    rows[:, :, 0] = levels
    return rows, Ranges(np.ones(levels.shape[::2], np.float32), np.zeros(levels.shape[::2], np.float32))


@pytest.mark.parametrize("implementation", [reference, kernel])
@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("dim", [8, 80])
def test_each_element_lies_where_the_definition_says(implementation, precision, dim):
    rng = np.random.default_rng(dim)
    levels = rng.integers(0, precision.levels + 1, (2, 3 * TILE_TOKENS, dim), np.uint8)
    tiles, clipped, nonfinite = implementation.quantise_keys(*levels_as_rows(levels), precision)
    assert (clipped, nonfinite) == (0, 0)
    for head, token, d in np.ndindex(levels.shape):
        tile, t = divmod(token, 16)
        if precision is Precision.int8:
            found = tiles[head, tile, d // 4 * 64 + 4 * t + d % 4]
        else:
            byte = tiles[head, tile, d // 8 * 64 + 4 * t + d % 4]
            found = byte >> 4 if d % 8 >= 4 else byte & 15
        assert found == levels[head, token, d]
    np.testing.assert_array_equal(reference.from_tiles(tiles, precision), levels)


def test_tile_sizes():
    assert tile_bytes(128, Precision.int8) == 2048
    assert tile_bytes(80, Precision.int4) == 640


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_an_append_unit_is_whole_tiles_and_whole_pages(dtype, head_dim):
    shape = Shape(2, 2, head_dim, dtype, Precision.int4)
    shape.validate()
    assert shape.append_unit % TILE_TOKENS == 0
    assert shape.append_unit * shape.row_bytes % PAGE == 0
    half = shape.append_unit // 2
    assert half % TILE_TOKENS or half * shape.row_bytes % PAGE


def test_known_shapes():
    shape = Shape(32, 8, 128, DType.float16, Precision.int4)
    assert (shape.row_bytes, shape.append_unit, shape.key_tile_bytes) == (512, 16, 1024)
    assert Shape(1, 1, 80, DType.bfloat16).append_unit == 64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0),
        ("kv_heads", 0),
        ("kv_heads", 1025),
        ("head_dim", 0),
        ("head_dim", 12),
        ("head_dim", 264),
    ],
)
def test_shapes_out_of_range_are_refused(field, value):
    fields = {"layers": 1, "kv_heads": 1, "head_dim": 64} | {field: value}
    with pytest.raises(InvalidInput, match=field):
        Shape(**fields, dtype=DType.float32).validate()


@pytest.mark.parametrize("kind", [DType, Precision, Reduction])
def test_enums_agree_with_the_wire(kind):
    from hillinfer_core.v1 import cold_pool_pb2

    prefix = kind.__name__.upper()
    for member in kind:
        number = getattr(cold_pool_pb2, f"{prefix}_{member.value.upper()}")
        assert member.to_proto() == number
        assert kind.from_proto(number) is member
    for unknown in (0, 99):
        with pytest.raises(InvalidInput, match="not known"):
            kind.from_proto(unknown)


def test_storage_dtypes():
    assert [dtype.storage for dtype in DType] == [np.float16, np.uint16, np.float32]
    assert [dtype.itemsize for dtype in DType] == [2, 2, 4]
