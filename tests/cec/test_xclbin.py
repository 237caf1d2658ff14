from __future__ import annotations

import random
import struct
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xclbin_writer import ENTRY, OWN, SHELL, TABLE, Container, default_sections, ip_layout

from hillinfer_core.errors import BadBitstream, HillInferError, by_name
from hillinferd.cec.xclbin import LARGEST_TABLE, Xclbin, parse_xclbin, read_xclbin

VALID = Container().build()
LENGTH, MODE, INTERFACE, PLATFORM, OWN_UUID, COUNT = 304, 332, 336, 352, 416, 448


def put(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def accepted(data: bytes) -> Xclbin | None:
    """Parse; whatever is accepted must be a container that hides nothing."""
    fault = ""
    try:
        found = parse_xclbin(data)
    except BadBitstream as error:
        fault = str(error)
    if fault:
        assert "\n" not in fault
        return None
    end = TABLE + ENTRY * len(found.sections)
    assert struct.unpack_from("<Q", data, LENGTH) == (len(data),)
    for section in sorted(found.sections, key=lambda section: (section.offset, section.size)):
        assert end <= section.offset < end + 8
        assert section.offset % 8 == 0
        assert not any(data[end : section.offset])
        end = section.offset + section.size
    assert end <= len(data)
    assert sum(section.kind == 0 and section.size > 0 for section in found.sections) == 1
    assert found.kernels
    assert found.uuid.int
    assert found.interface_uuid.int
    assert all(text.isprintable() for text in (found.platform, *found.kernels))
    return found


def test_a_whole_container_is_read() -> None:
    found = parse_xclbin(VALID)
    assert (found.uuid, found.interface_uuid) == (OWN, SHELL)
    assert found.platform == "xilinx_u2_gen3x4_xdma_gc_2_202110_1"
    assert found.version == (2, 13, 436)
    assert found.mode == "pr"
    assert found.for_hardware
    assert found.kernels == ("evaluate_int4:evaluate_int4_1",)
    assert [(s.kind, s.name, s.size) for s in found.sections] == [
        (kind, name, len(content)) for kind, name, content in default_sections()
    ]
    for section, (_, _, content) in zip(found.sections, default_sections(), strict=True):
        assert VALID[section.offset : section.offset + section.size] == content


def test_mirrored_metadata_and_other_ips_are_accepted() -> None:
    sections = default_sections()
    sections[2] = (8, "ip", ip_layout(["ddr", "evaluate_int8:a", "evaluate_int4:b"], [4, 1, 1]))
    found = parse_xclbin(Container(sections=sections, mirror=b'{"schema_version": {}}').build())
    assert found.kernels == ("evaluate_int8:a", "evaluate_int4:b")


@pytest.mark.parametrize("mode", [2, 3, 4, 5, 6])
def test_emulation_is_told_apart(mode: int) -> None:
    assert not parse_xclbin(Container(mode=mode).build()).for_hardware


def without(*kinds: int) -> bytes:
    return Container(sections=[s for s in default_sections() if s[0] not in kinds]).build()


def replaced(kind: int, content: bytes) -> bytes:
    return Container(sections=[(k, n, content if k == kind else c) for k, n, c in default_sections()]).build()


IP = ip_layout(["evaluate_int4:x"])
FAULTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "too few"),
    "short": (lambda: VALID[: TABLE - 1], "too few"),
    "magic": (lambda: put(VALID, 0, b"xclbin1"), "magic"),
    "magic end": (lambda: put(VALID, 7, b"x"), "magic"),
    "signed": (lambda: put(VALID, 8, struct.pack("<i", 256)), "signed"),
    "cut": (lambda: VALID[:-1], "the file has"),
    "longer": (lambda: VALID + b"\0", "the file has"),
    "longer and said": (lambda: put(VALID + b"x", LENGTH, u64(len(VALID) + 1)), "unaccounted"),
    "length wraps": (lambda: put(VALID, LENGTH, u64(2**64 - 1)), "the file has"),
    "mode": (lambda: put(VALID, MODE, b"\7"), "mode 7"),
    "no section": (lambda: put(VALID, COUNT, struct.pack("<I", 0)), "0 sections"),
    "many sections": (lambda: put(VALID, COUNT, struct.pack("<I", LARGEST_TABLE + 1)), "sections"),
    "table passes end": (lambda: put(VALID, COUNT, struct.pack("<I", LARGEST_TABLE)), "passes the end"),
    "uuid": (lambda: put(VALID, OWN_UUID, bytes(16)), "uuid is zero"),
    "interface": (lambda: put(VALID, INTERFACE, bytes(16)), "interface uuid is zero"),
    "platform hides": (lambda: put(VALID, PLATFORM + 60, b"x"), "after its end"),
    "platform escape": (lambda: put(VALID, PLATFORM, b"\x1b"), "printable"),
    "kind": (lambda: put(VALID, TABLE, struct.pack("<I", 64)), "unknown kind"),
    "offset in table": (lambda: put(VALID, TABLE + 24, u64(TABLE)), "outside"),
    "offset wraps": (lambda: put(VALID, TABLE + 24, u64(2**64 - 8)), "outside"),
    "size wraps": (lambda: put(VALID, TABLE + 32, u64(2**64 - 1)), "outside"),
    "size past end": (lambda: put(VALID, TABLE + 32, u64(len(VALID))), "outside"),
    "unaligned": (lambda: put(VALID, TABLE + 24, u64(TABLE + 4 * ENTRY + 1)), "not aligned"),
    "overlap": (lambda: put(VALID, TABLE + ENTRY + 24, u64(TABLE + 4 * ENTRY)), "overlap"),
    "hole": (lambda: put(VALID, TABLE + 32, u64(8)), "unaccounted"),
    "two bitstreams": (
        lambda: Container(sections=[*default_sections(), (0, "b", b"x")]).build(),
        "two sections",
    ),
    "no bitstream": (lambda: without(0), "no bitstream"),
    "empty bitstream": (lambda: replaced(0, b""), "no bitstream"),
    "no ip layout": (lambda: without(8), "no kernel"),
    "ip layout cut": (lambda: replaced(8, b"\1"), "cut short"),
    "ip layout short": (lambda: replaced(8, IP[:-1]), "entries"),
    "ip layout long": (lambda: replaced(8, IP + bytes(8)), "entries"),
    "ip count negative": (lambda: replaced(8, put(IP, 0, struct.pack("<i", -1))), "counts -1"),
    "ip count huge": (lambda: replaced(8, put(IP, 0, struct.pack("<i", 2**31 - 1))), "counts"),
    "no kernel": (lambda: replaced(8, ip_layout(["ddr"], [4])), "no kernel"),
    "nameless kernel": (lambda: replaced(8, ip_layout([""])), "no kernel"),
    "two of a name": (lambda: replaced(8, ip_layout(["a:1", "a:1"])), "one name"),
    "ip type": (lambda: replaced(8, ip_layout(["a"], [99])), "unknown type"),
    "mirror without end": (
        lambda: put(Container(mirror=b"{}").build(), len(Container(mirror=b"{}").build()) - 1, b"X"),
        "unaccounted",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(fault: str) -> None:
    make, says = FAULTS[fault]
    with pytest.raises(BadBitstream, match=says):
        parse_xclbin(make())


def test_every_truncation_is_refused() -> None:
    for length in range(len(VALID)):
        with pytest.raises(BadBitstream):
            parse_xclbin(VALID[:length])
        # Also where the header agrees with the cut.
        if length >= TABLE:
            assert accepted(put(VALID, LENGTH, u64(length))[:length]) is None


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.xclbin", tmp_path):
        with pytest.raises(BadBitstream, match="cannot read"):
            read_xclbin(path)
    (tmp_path / "bad.xclbin").write_bytes(b"xclbin2\0")
    with pytest.raises(BadBitstream, match=r"bad\.xclbin is not a usable xclbin.*build it again"):
        read_xclbin(tmp_path / "bad.xclbin")
    (tmp_path / "good.xclbin").write_bytes(VALID)
    assert read_xclbin(tmp_path / "good.xclbin") == parse_xclbin(VALID)


def test_the_error_crosses_processes_by_name() -> None:
    assert by_name("BadBitstream") is BadBitstream
    assert BadBitstream.status == "FAILED_PRECONDITION"
    assert issubclass(BadBitstream, HillInferError)


TEXT = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=16)
SECTION = st.tuples(st.integers(21, 35), TEXT, st.binary(max_size=40))


@given(
    own=st.uuids(),
    interface=st.uuids(),
    mode=st.integers(0, 6),
    extra=st.lists(SECTION, max_size=6),
    kernels=st.lists(TEXT.filter(bool), min_size=1, max_size=4, unique=True),
    mirror=st.binary(max_size=20).filter(lambda text: b"\0" not in text),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_every_valid_container_is_accepted(
    own: uuid.UUID,
    interface: uuid.UUID,
    mode: int,
    extra: list[tuple[int, str, bytes]],
    kernels: list[str],
    mirror: bytes,
    data: st.DataObject,
) -> None:
    sections = data.draw(st.permutations([(0, "b", b"bits"), (8, "ip", ip_layout(kernels)), *extra]))
    found = accepted(Container(own, interface, "p", mode, mirror, sections).build())
    assert found is not None
    assert (found.uuid, found.interface_uuid, found.kernels) == (own, interface, tuple(kernels))
    assert [(s.kind, s.name, s.size) for s in found.sections] == [(k, n, len(c)) for k, n, c in sections]


@given(st.binary(max_size=600), st.sampled_from([0, 8, 304, TABLE, TABLE + 160]))
@settings(max_examples=500, deadline=None)
def test_garbage_behind_a_good_beginning_is_refused(garbage: bytes, kept: int) -> None:
    assert accepted(VALID[:kept] + garbage) is None


SEEDS = (VALID, Container(mirror=b"{}").build(), Container(sections=default_sections()[::-1]).build())
NUMBERS = (0, 1, 7, 8, 39, 40, 455, 456, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def mutate(chance: random.Random) -> bytes:
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.randrange(1, 5)):
        # Half of the blows fall on header and table, where they matter.
        limit = min(len(data), 640) if chance.random() < 0.5 else len(data)
        at = chance.randrange(limit) if limit else 0
        blow = chance.randrange(7)
        if blow == 0 and data:
            data[at] ^= 1 << chance.randrange(8)
        elif blow == 1:
            data[at : at + 8] = u64(chance.choice(NUMBERS))
        elif blow == 2:
            field = chance.choice(
                (LENGTH, COUNT, *(TABLE + ENTRY * s + f for s in range(4) for f in (0, 24, 32)))
            )
            data[field : field + 8] = u64((chance.choice(NUMBERS) + chance.randrange(-9, 1000)) % 2**64)
        elif blow == 3:
            del data[at : at + chance.randrange(1, 64)]
        elif blow == 4:
            data[at:at] = chance.randbytes(chance.randrange(1, 64))
        elif blow == 5:
            data[at : at + 32] = data[: min(32, len(data))]
        else:
            data[at : at + 16] = chance.randbytes(16)
    if chance.random() < 0.5 and len(data) >= LENGTH + 8:
        data[LENGTH : LENGTH + 8] = u64(len(data))
    return bytes(data)


def fuzz(rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    outcomes = [accepted(mutate(chance)) is not None for _ in range(rounds)]
    # Blows on free bytes (uuid, contents) leave it well-formed: the mutations reach past the first checks.
    assert 0 < sum(outcomes) < rounds / 2


def test_100_000_mutations_crash_nothing() -> None:
    fuzz(100_000, seed=1)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_million_mutations_crash_nothing() -> None:
    fuzz(1_000_000, seed=2)
