from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from hillinfer_core.errors import PoolFull
from hillinfer_core.layout import DType, Shape
from hillinferd.domain.extents import GRANULE, Extent, ExtentAllocator
from hillinferd.domain.placement import LARGEST_TOKENS, extend, extent_bytes

CAPACITY = 40 * GRANULE
RESERVED = GRANULE


class Allocation(RuleBasedStateMachine):
    extents = Bundle("extents")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = ExtentAllocator(CAPACITY, RESERVED)
        self.live: set[Extent] = set()

    @rule(target=extents, nbytes=st.integers(1, 12 * GRANULE))
    def allocate(self, nbytes: int) -> object:
        try:
            extent = self.allocator.allocate(nbytes)
        except PoolFull:
            needed = -(-nbytes // GRANULE) * GRANULE
            assert all(hole.length < needed for hole in self.allocator.free_ranges())
            return multiple()
        assert extent.length >= nbytes
        assert extent.length - nbytes < GRANULE
        self.live.add(extent)
        return extent

    @rule(extent=consumes(extents))
    def free(self, extent: Extent) -> None:
        self.live.remove(extent)
        self.allocator.free(extent)
        with pytest.raises(ValueError, match="not in use"):
            self.allocator.free(extent)

    @invariant()
    def every_granule_has_one_owner(self) -> None:
        ranges = sorted([*self.live, *self.allocator.free_ranges()])
        assert ranges[0].offset == RESERVED
        assert ranges[-1].end == CAPACITY
        for before, after in pairwise(ranges):
            assert before.end == after.offset

    @invariant()
    def free_neighbours_are_joined(self) -> None:
        free = self.allocator.free_ranges()
        assert free == sorted(free)
        for before, after in pairwise(free):
            assert before.end < after.offset

    @invariant()
    def books_are_right(self) -> None:
        assert self.allocator.used_bytes == sum(extent.length for extent in self.live)
        assert self.allocator.count == len(self.live)


TestAllocation = Allocation.TestCase
TestAllocation.settings = settings(max_examples=60, deadline=None)

SHAPE = Shape(1, 2, 64, DType.float16)


def test_extents_of_a_layer_grow_and_every_row_has_its_own_place() -> None:
    allocator = ExtentAllocator(1 << 30)
    placed = []
    for needed in (16, 300, 1000, 9000):
        placed += extend(allocator, SHAPE, placed[-1].end_token if placed else 0, needed)
    assert [item.tokens for item in placed] == [256, 256, 512, 1024, 2048, 4096, 4096]
    assert max(item.tokens for item in placed) == LARGEST_TOKENS
    offsets = {
        item.row_offset(head, token, SHAPE.row_bytes)
        for item in placed
        for head in range(SHAPE.kv_heads)
        for token in range(item.first_token, item.end_token)
    }
    assert len(offsets) == placed[-1].end_token * SHAPE.kv_heads
    assert all(
        item.extent.offset
        <= item.row_offset(1, item.end_token - 1, SHAPE.row_bytes)
        <= item.extent.end - SHAPE.row_bytes
        for item in placed
    )


def test_a_fragmented_pool_is_used_in_smaller_extents_and_a_full_one_changes_nothing() -> None:
    piece = -(-extent_bytes(SHAPE, 256) // GRANULE) * GRANULE
    allocator = ExtentAllocator(12 * piece)
    pieces = [allocator.allocate(piece) for _ in range(12)]
    for extent in pieces[::2]:
        allocator.free(extent)
    placed = extend(allocator, SHAPE, 0, 1024)
    assert [item.tokens for item in placed] == [256] * 4
    before = allocator.free_ranges()
    with pytest.raises(PoolFull, match="pool_capacity"):
        extend(allocator, SHAPE, 1024, 1024 + 3 * 256)
    assert allocator.free_ranges() == before
