"""Contexts, extents and records against a model: whatever is done, nothing overlaps, leaks or is lost."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hillinfer_core.errors import HillInferError, PoolFull
from hillinfer_core.layout import DType, Precision, Shape
from hillinfer_core.reference import Ranges
from hillinferd.domain.content import Appended
from hillinferd.domain.contexts import Catalogue, Context, Quotas
from hillinferd.domain.durable import Durable
from hillinferd.domain.extents import GRANULE, ExtentAllocator
from hillinferd.domain.quantisation import Quantisation
from hillinferd.records.database import Database
from hillinferd.records.durable import DurableRecords

SHAPE = Shape(2, 2, 64, DType.float16, Precision.int4)
CAPACITY = 80 * GRANULE
LARGE = 1 << 60
QUANTISATION = Quantisation(Ranges(np.ones((2, 64), np.float32), np.zeros((2, 64), np.float32)), 16)


@dataclass
class Model:
    """What should be so of an open context, or of a durable one."""

    tokens: list[int] = field(default_factory=lambda: [0, 0])
    saved: bool = False


class Books(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="books-"))
        self.durable: dict[str, Model] = {}
        self.open: dict[int, tuple[Context, Model]] = {}
        self.start()

    def start(self) -> None:
        self.records = DurableRecords(Database(self.directory / "catalogue"))
        self.books = Catalogue(ExtentAllocator(CAPACITY, reserved=GRANULE), Quotas(LARGE, LARGE))
        for durable in self.records.load():
            self.books.restore(durable)

    def teardown(self) -> None:
        self.records.database.close()
        shutil.rmtree(self.directory)

    @rule()
    def open_volatile(self) -> None:
        context = self.books.open(1, 0, SHAPE)
        self.open[context.context_id] = context, Model()

    @rule(name=st.sampled_from("abc"))
    def open_writer(self, name: str) -> None:
        new = Durable(0, name, 0, SHAPE, {}, 0)
        try:
            context = self.books.open_writer(1, 0, name, SHAPE, {}, new)
        except HillInferError:
            model = self.durable[name]
            assert model.saved or any(it.durable and it.durable.name == name for it, _ in self.open.values())
            return
        if context.durable is new:
            assert name not in self.durable
            self.records.create(new)
            self.durable[name] = Model()
        self.open[context.context_id] = context, self.durable[name]

    @rule(name=st.sampled_from("abc"))
    def open_reader(self, name: str) -> None:
        try:
            context = self.books.open_reader(1, 0, self.books.find_durable(0, name), SHAPE, {})
        except HillInferError:
            assert name not in self.durable or not self.durable[name].saved
            return
        self.open[context.context_id] = context, Model(list(self.durable[name].tokens))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), layer=st.integers(0, 1), units=st.integers(1, 60), fails=st.booleans())
    def append(self, data: st.DataObject, layer: int, units: int, fails: bool) -> None:
        context, model = self.open[data.draw(st.sampled_from(sorted(self.open)))]
        tokens, first = units * SHAPE.append_unit, model.tokens[layer]
        before = self.books.allocator.used_bytes
        try:
            placed = self.books.reserve(context, layer, first, tokens)
        except PoolFull:
            assert self.books.allocator.used_bytes == before
            return
        except HillInferError:
            assert context.durable
            assert model.saved
            return
        if fails:
            self.books.rollback(context, placed)
            assert self.books.allocator.used_bytes == before
            return
        if context.durable:
            checksums = np.full((2, tokens), first, np.uint32)
            self.records.append(context.durable, layer, tokens, placed, Appended(QUANTISATION, [], checksums))
        self.books.commit(context, layer, tokens, placed)
        model.tokens[layer] += tokens

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        context, _ = self.open.pop(data.draw(st.sampled_from(sorted(self.open))))
        self.books.close(context)

    @precondition(lambda self: any(context.durable for context, _ in self.open.values()))
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        writers = [number for number, (context, _) in self.open.items() if context.durable]
        context, model = self.open[data.draw(st.sampled_from(writers))]
        assert context.durable is not None
        self.records.save(context.durable, [])
        context.durable.saved = model.saved = True

    @rule(name=st.sampled_from("abc"))
    def delete(self, name: str) -> None:
        try:
            durable = self.books.find_durable(0, name)
            durable.check_free("cannot delete")
        except HillInferError:
            used = [it.durable or it.base for it, _ in self.open.values()]
            assert name not in self.durable or any(it and it.name == name for it in used)
            return
        self.records.delete(durable)
        self.books.delete(durable)
        del self.durable[name]

    @rule()
    def restart(self) -> None:
        self.records.database.close()
        self.open.clear()
        self.start()
        contents = {durable.name: self.records.content(durable) for durable in self.books.durables}
        for name, model in self.durable.items():
            assert [layer.tokens for layer in contents[name]] == model.tokens

    @invariant()
    def books_and_model_agree(self) -> None:
        assert {durable.name for durable in self.books.durables} == set(self.durable)
        for durable in self.books.durables:
            model = self.durable[durable.name]
            assert durable.saved == model.saved
            assert [layer.tokens for layer in durable.layers] == model.tokens
        for context, model in self.open.values():
            assert [layer.tokens for layer in context.layers] == model.tokens
            for layer in context.layers:
                assert layer.covered >= layer.tokens
                assert all(a.end_token == b.first_token for a, b in pairwise(layer.placed))

    @invariant()
    def extents_neither_overlap_nor_leak(self) -> None:
        owned = [extent for durable in self.books.durables for extent in durable.extents]
        owned += [extent for context, _ in self.open.values() for extent in context.own_extents]
        allocator = self.books.allocator
        ranges = sorted(owned + allocator.free_ranges())
        assert all(a.end == b.offset for a, b in pairwise(ranges))
        assert sum(extent.length for extent in ranges) == allocator.capacity
        assert sum(extent.length for extent in owned) == allocator.used_bytes


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
