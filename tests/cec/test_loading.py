from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from xclbin_writer import SHELL, Container, default_sections, ip_layout

from hillinfer_core.errors import BadBitstream, ContextInUse, DeviceUnavailable
from hillinferd.cec.catalogue import read_catalogue
from hillinferd.cec.configurable import Outcome, Vector
from hillinferd.cec.configurations import SHIPPED
from hillinferd.cec.loader import Loader
from hillinferd.cec.selftest import expected, vectors
from hillinferd.cec.xclbin import read_xclbin

OTHER_SHELL = UUID(int=5)
BDF = "0000:65:00.1"
KERNELS = [kernel.name for kernel in SHIPPED]


class BenchCard:
    """A card that computes what the reference does, unless its bitstream is in ``wrong``."""

    def __init__(self, shell: UUID = SHELL) -> None:
        self.shell = shell
        self.uuid: UUID | None = None
        self.in_use = False
        self.loads: list[UUID] = []
        self.wrong: set[UUID] = set()
        self.misreported: set[UUID] = set()
        self.dead = False

    def interface_uuids(self) -> list[UUID]:
        return [self.shell]

    def loaded_uuid(self) -> UUID | None:
        return UUID(int=404) if self.uuid in self.misreported else self.uuid

    def configure(self, path: Path) -> None:
        if self.dead:
            raise DeviceUnavailable("the card is gone")
        self.in_use = True
        own = read_xclbin(path).uuid
        if own != self.uuid:
            self.loads.append(own)
            self.uuid = own

    def release(self) -> None:
        self.in_use = False

    def run_vector(self, kernel: str, vector: Vector) -> Outcome:
        assert self.in_use
        outcome = expected(vector)
        if self.uuid in self.wrong:
            outcome.histogram[0, 7] ^= 1
        return outcome


@pytest.fixture
def catalogue_path(tmp_path: Path) -> Path:
    """A catalogue of the three kernels for the card's shell, and one for another shell."""
    directory = tmp_path / "bitstreams"
    directory.mkdir()
    tables = []
    for number, (kernel, shell) in enumerate(
        [*((name, SHELL) for name in KERNELS), (KERNELS[0], OTHER_SHELL)], 1
    ):
        sections = [
            (kind, name, ip_layout([f"{kernel}:{kernel}_1"]) if kind == 8 else content)
            for kind, name, content in default_sections()
        ]
        data = Container(own=UUID(int=number), interface=shell, sections=sections).build()
        (directory / f"{number}.xclbin").write_bytes(data)
        configuration = next(item for item in SHIPPED if item.name == kernel)
        tables.append(
            f'[[bitstream]]\nfile = "{number}.xclbin"\nsha256 = "{hashlib.sha256(data).hexdigest()}"\n'
            f'kernel = "{kernel}"\nprecision = "{configuration.precision}"\nhead_dims = [64, 80]\n'
            f'interface_uuid = "{shell}"\n'
        )
    (directory / "manifest.toml").write_text("version = 1\n" + "\n".join(tables))
    return directory / "manifest.toml"


def loader(card: BenchCard, catalogue_path: Path) -> Loader:
    return Loader(card, read_catalogue(catalogue_path), catalogue_path.parents[1] / "state" / BDF)


def test_the_loaded_bitstream_is_proved_and_remembered(catalogue_path: Path) -> None:
    card = BenchCard()
    first = loader(card, catalogue_path)
    empty = first.status()
    assert (empty.loaded, empty.good, empty.good_loaded, len(empty.catalogue)) == (None, None, False, 4)
    status = first.load("evaluate_int4", 0)
    assert status.good_loaded
    assert status.loaded == UUID(int=2)
    assert status.previous is None
    assert first.load("1.xclbin", 0).previous == status.good
    assert first.load("1.xclbin", 3).previous == status.good  # it is loaded: nothing to refuse
    assert card.loads == [UUID(int=2), UUID(int=1)]
    again = loader(card, catalogue_path).status()
    assert again == first.status()


def test_rollback_goes_back_and_forth(catalogue_path: Path) -> None:
    card = BenchCard()
    used = loader(card, catalogue_path)
    with pytest.raises(BadBitstream, match="no bitstream was good before"):
        used.rollback(0)
    used.load("evaluate_int4", 0)
    used.load("evaluate_int8_q16", 0)
    assert used.rollback(0).loaded == UUID(int=2)
    assert used.rollback(0).loaded == UUID(int=3)
    # The copies are ours: the catalogue may have been emptied meanwhile.
    for path in catalogue_path.parent.glob("*.xclbin"):
        path.unlink()
    assert used.rollback(0).loaded == UUID(int=2)


def test_open_contexts_forbid_a_change(catalogue_path: Path) -> None:
    card = BenchCard()
    used = loader(card, catalogue_path)
    used.load("evaluate_int4", 0)
    used.load("evaluate_int8", 0)
    with pytest.raises(ContextInUse, match="2 open contexts need the loaded bitstream; close them"):
        used.load("evaluate_int4", 2)
    with pytest.raises(ContextInUse, match="1 open context needs"):
        used.rollback(1)
    assert card.loads == [UUID(int=2), UUID(int=1)]


def test_what_the_card_cannot_have_never_reaches_it(catalogue_path: Path) -> None:
    card = BenchCard()
    used = loader(card, catalogue_path)
    with pytest.raises(BadBitstream, match="no bitstream 'nothing'; it has evaluate_int8"):
        used.load("nothing", 0)
    with pytest.raises(BadBitstream, match=f"the card has {SHELL}"):
        used.load("4.xclbin", 0)
    with pytest.raises(BadBitstream, match=f"built for shell interface {SHELL}, the card has"):
        loader(BenchCard(UUID(int=6)), catalogue_path).load("evaluate_int8", 0)
    path = catalogue_path.parent / "1.xclbin"
    path.write_bytes(path.read_bytes().replace(b"<xml/>", b"<XML/>"))
    with pytest.raises(BadBitstream, match="it is not that file"):
        used.load("1.xclbin", 0)
    assert card.loads == []
    # Of two for a kernel, the one that suits the card is meant.
    assert loader(BenchCard(OTHER_SHELL), catalogue_path).load("evaluate_int8", 0).loaded == UUID(int=4)


@pytest.mark.parametrize("fault", ["wrong", "misreported"])
def test_one_that_fails_makes_way_for_the_last_good_one(catalogue_path: Path, fault: str) -> None:
    card = BenchCard()
    used = loader(card, catalogue_path)
    used.load("evaluate_int4", 0)
    before = used.status()
    getattr(card, fault).add(UUID(int=1))
    with pytest.raises(BadBitstream, match=r"2\.xclbin is loaded again"):
        used.load("evaluate_int8", 0)
    assert used.status() == before == loader(card, catalogue_path).status()
    assert card.in_use
    assert card.loads == [UUID(int=2), UUID(int=1), UUID(int=2)]
    assert len(list((catalogue_path.parents[1] / "state" / BDF).glob("*.xclbin"))) == 1


def test_a_file_that_fails_under_another_entry_stays_the_last_good_one(catalogue_path: Path) -> None:
    card = BenchCard()
    loader(card, catalogue_path).load("evaluate_int4", 0)
    manifest = catalogue_path.read_text()
    catalogue_path.write_text(manifest.replace("head_dims = [64, 80]", "head_dims = [64]"))
    card.wrong.add(UUID(int=2))
    with pytest.raises(DeviceUnavailable, match="cannot be loaded again"):
        loader(card, catalogue_path).load("evaluate_int4", 0)
    card.wrong.clear()
    (catalogue_path.parent / "2.xclbin").unlink()
    assert loader(card, catalogue_path).restore().good_loaded


def test_the_first_one_that_fails_is_not_used(catalogue_path: Path) -> None:
    card = BenchCard()
    card.wrong.add(UUID(int=1))
    with pytest.raises(BadBitstream, match="does not compute what it should at head dimension 64"):
        loader(card, catalogue_path).load("evaluate_int8", 0)
    assert not card.in_use
    assert loader(card, catalogue_path).status().good is None


def test_when_the_last_good_one_fails_too(catalogue_path: Path) -> None:
    card = BenchCard()
    used = loader(card, catalogue_path)
    used.load("evaluate_int4", 0)
    card.wrong = {UUID(int=1), UUID(int=2)}
    with pytest.raises(
        DeviceUnavailable, match=r"2\.xclbin, cannot be loaded again .*cec load evaluate_int4"
    ):
        used.load("evaluate_int8", 0)
    assert not card.in_use
    card.wrong = set()
    assert used.load("evaluate_int4", 0).good_loaded


def test_after_a_restart_the_last_good_one_is_loaded_and_proved(catalogue_path: Path) -> None:
    card = BenchCard()
    assert loader(card, catalogue_path).restore().good is None
    assert card.loads == []
    loader(card, catalogue_path).load("evaluate_int4", 0)
    fresh = BenchCard()
    assert loader(fresh, catalogue_path).restore().good_loaded
    assert fresh.loads == [UUID(int=2)]
    fresh.wrong.add(UUID(int=2))
    with pytest.raises(BadBitstream, match="self-test"):
        loader(fresh, catalogue_path).restore()
    assert not fresh.in_use
    fresh.dead = True
    with pytest.raises(DeviceUnavailable, match="gone"):
        loader(fresh, catalogue_path).restore()


def test_a_copy_that_was_altered_is_not_loaded(catalogue_path: Path) -> None:
    card = BenchCard()
    loader(card, catalogue_path).load("evaluate_int4", 0)
    (copy,) = (catalogue_path.parents[1] / "state" / BDF).glob("*.xclbin")
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    fresh = BenchCard()
    with pytest.raises(BadBitstream):
        loader(fresh, catalogue_path).restore()
    assert fresh.loads == []


def test_every_damage_of_the_state_is_noticed(catalogue_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    card = BenchCard()
    loader(card, catalogue_path).load("evaluate_int4", 0)
    path = catalogue_path.parents[1] / "state" / BDF / "state.json"
    whole = path.read_bytes()
    damaged = [whole[:cut] for cut in range(0, len(whole) - 2, 37)]
    for place in range(0, len(whole) - 1, 11):
        damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    damaged += [b"[]", b"7", b"null", b"[" * 100_000, b"\xff\xfe", json.dumps({"checksum": 5}).encode()]
    for content in damaged:
        path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = loader(card, catalogue_path).status().good
        try:
            same = json.loads(content) == json.loads(whole)
        except (ValueError, RecursionError):
            same = False
        assert same or (found is None and "no bitstream counts as good" in caplog.text), content


@pytest.mark.parametrize("kernel", SHIPPED, ids=KERNELS)
def test_a_self_test_sees_any_one_wrong_number(kernel) -> None:
    # The vectors reach every lane, and their scores use every bit of a histogram's range.
    for vector in vectors(kernel, (64,)):
        outcome = expected(vector)
        for name in ("ids", "scores", "histogram", "checksums"):
            changed = getattr(outcome, name).copy()
            changed.flat[-1] ^= changed.dtype.type(1)
            assert not outcome.same(replace(outcome, **{name: changed}))
        assert outcome.same(replace(outcome, ids=outcome.ids.copy()))
        lanes = np.unique(outcome.ids % 16)
        assert len(lanes) == 16
