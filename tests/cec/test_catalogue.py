from __future__ import annotations

import hashlib
import random
import re
import tomllib
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xclbin_writer import SHELL, Container, default_sections, ip_layout

from hillinfer_core.errors import BadBitstream, ConfigError
from hillinferd.cec.catalogue import (
    Entry,
    check_bitstream,
    parse_manifest,
    parse_uuid,
    read_catalogue,
    verified,
)
from hillinferd.cec.xclbin import parse_xclbin

BITSTREAM = Container().build()
OTHER_SHELL = uuid.UUID(int=5)


def manifest(bitstream: bytes = BITSTREAM, **changes: str) -> bytes:
    values = {
        "file": '"int4.xclbin"',
        "sha256": f'"{hashlib.sha256(bitstream).hexdigest()}"',
        "kernel": '"evaluate_int4"',
        "precision": '"int4"',
        "head_dims": "[64, 128]",
        "interface_uuid": f'"{SHELL}"',
        **changes,
    }
    lines = [f"{key} = {value}" for key, value in values.items() if value]
    return ("version = 1\n\n[[bitstream]]\n" + "\n".join(lines) + "\n").encode()


def entry(bitstream: bytes = BITSTREAM, **changes: str) -> Entry:
    return parse_manifest(manifest(bitstream, **changes))[0]


def test_a_manifest_is_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.toml").write_bytes(manifest(interface_uuid=f'"{SHELL.hex}"'))
    (tmp_path / "int4.xclbin").write_bytes(BITSTREAM)
    catalogue = read_catalogue(tmp_path / "manifest.toml")
    found = catalogue.find("evaluate_int4", 128, [OTHER_SHELL, SHELL])
    assert found.interface_uuid == SHELL
    assert verified(catalogue, found, [SHELL]).sha256 == found.sha256


@pytest.mark.parametrize(
    ("kernel", "head_dim", "shell", "lacks"),
    [
        ("evaluate_int8", 64, SHELL, "kernel evaluate_int8"),
        ("evaluate_int4", 80, SHELL, "head dimension 80"),
        ("evaluate_int4", 64, OTHER_SHELL, "the card's shell"),
    ],
)
def test_what_the_catalogue_lacks_is_named(
    tmp_path: Path, kernel: str, head_dim: int, shell: uuid.UUID, lacks: str
) -> None:
    (tmp_path / "manifest.toml").write_bytes(manifest())
    with pytest.raises(BadBitstream, match=lacks):
        read_catalogue(tmp_path / "manifest.toml").find(kernel, head_dim, [shell])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"version = ", "is not TOML"),
        (b"\xff", "is not TOML"),
        (b"a = " + b"[" * 100_000, "is not TOML"),
        (b"bitstream = []", "lacks the key version"),
        (b"version = 1", "lacks the key bitstream"),
        (b"version = 2\nbitstream = []", "version must be 1, not 2"),
        (b"version = true\nbitstream = []", "version must be 1, not True"),
        (b"version = 1\nbitstream = 3", r"\[\[bitstream\]\]"),
        (b"version = 1\nbitstream = [3]", r"\[\[bitstream\]\]"),
        (b"version = 1\nbitstream = []\nbitstreams = []", "unknown key 'bitstreams'"),
        (manifest(extra="1"), "bitstream 1 has the unknown key 'extra'"),
        (manifest(sha256=""), "bitstream 1 lacks the key sha256"),
        (manifest(sha256='"AB"'), "sha256 must be 64 lower-case hex digits, not 'AB'"),
        (manifest(sha256="1"), "sha256"),
        (manifest(file='"../int4.xclbin"'), "plain name"),
        (manifest(file='"/etc/x.xclbin"'), "plain name"),
        (manifest(file='".xclbin"'), "plain name"),
        (manifest(file='"a.xclbin\\n"'), "plain name"),
        (manifest(kernel='"evaluate_fp8"'), "one of evaluate_int8, evaluate_int4"),
        (manifest(kernel="[1]"), "kernel"),
        (manifest(precision='"int8"'), "evaluate_int4 has precision int4, not int8"),
        (manifest(precision="[]"), "one of int8, int4"),
        (manifest(head_dims="[]"), "head_dims"),
        (manifest(head_dims="[128, 64]"), "ascending multiples of 8"),
        (manifest(head_dims="[64, 64]"), "head_dims"),
        (manifest(head_dims="[65]"), "head_dims"),
        (manifest(head_dims="[512]"), "head_dims"),
        (manifest(head_dims="[true]"), "head_dims"),
        (manifest(head_dims="64"), "head_dims"),
        (manifest(interface_uuid=f'"{uuid.UUID(int=0)}"'), "not all zero"),
        (manifest(interface_uuid='"862c7020"'), "interface_uuid"),
        (manifest(interface_uuid="1979-05-27"), "interface_uuid"),
        (manifest() + manifest().partition(b"\n\n")[2], "same file"),
    ],
)
def test_a_bad_manifest_names_key_value_and_what_is_allowed(text: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_manifest(text)


def test_a_manifest_that_cannot_be_read_names_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml"):
        read_catalogue(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"version = 2\nbitstream = []")
    with pytest.raises(ConfigError, match=r"bad\.toml: version"):
        read_catalogue(tmp_path / "bad.toml")


def kernel_section(name: str) -> list[tuple[int, str, bytes]]:
    return [(kind, n, ip_layout([name]) if kind == 8 else c) for kind, n, c in default_sections()]


@pytest.mark.parametrize(
    ("built", "says"),
    [
        (Container(mode=4), "built for emulation"),
        (Container(interface=OTHER_SHELL), "the manifest says"),
        (Container(sections=kernel_section("evaluate_int8:evaluate_int8_1")), "not evaluate_int4"),
        (Container(sections=kernel_section("evaluate_int4x:1")), "not evaluate_int4"),
    ],
)
def test_a_bitstream_that_is_not_what_the_manifest_says(built: Container, says: str) -> None:
    data = built.build()
    with pytest.raises(BadBitstream, match=says):
        check_bitstream(parse_xclbin(data), entry(data), [SHELL, OTHER_SHELL])


def test_a_bitstream_for_another_shell_is_refused() -> None:
    with pytest.raises(BadBitstream, match=f"the card has {OTHER_SHELL}; build it"):
        check_bitstream(parse_xclbin(BITSTREAM), entry(), [OTHER_SHELL])
    with pytest.raises(BadBitstream, match="the card has none"):
        check_bitstream(parse_xclbin(BITSTREAM), entry(), [])


def test_no_altered_bitstream_passes() -> None:
    wanted, chance, parsed = entry(), random.Random(3), 0
    for _ in range(2000):
        data = bytearray(BITSTREAM)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            found = parse_xclbin(bytes(data))
        except BadBitstream:
            continue
        parsed += 1
        with pytest.raises(BadBitstream, match="it is not that file"):
            check_bitstream(found, wanted, [SHELL, found.interface_uuid])
        # Were the sum forged as well, the shell would still have to be right.
        if found.interface_uuid != SHELL:
            with pytest.raises(BadBitstream):
                check_bitstream(found, replace(wanted, sha256=found.sha256), [SHELL])
    assert parsed > 100


GOOD = manifest()


def read_or_refuse(text: bytes) -> bool:
    fault = ""
    try:
        entries = parse_manifest(text)
    except ConfigError as error:
        fault = str(error)
    if fault:
        assert "\n" not in fault
        return False
    # What is accepted is what plain TOML says, and nothing else.
    document = tomllib.loads(text.decode())
    assert document.keys() == {"version", "bitstream"}
    for found, table in zip(entries, document["bitstream"], strict=True):
        assert found.sha256 == table["sha256"]
        assert found.file == table["file"]
        assert found.kernel.name == table["kernel"]
        assert list(found.head_dims) == table["head_dims"]
        assert uuid.UUID(table["interface_uuid"]) == found.interface_uuid
        assert re.fullmatch(r"[0-9a-f]{64}", found.sha256)
        assert "/" not in found.file
        assert found.kernel.precision is found.precision
        assert found.head_dims
        assert found.interface_uuid.int
    return True


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode())))
@settings(max_examples=300, deadline=None)
def test_garbage_manifests_are_typed_errors(text: bytes) -> None:
    assert not read_or_refuse(text)


def fuzz(rounds: int, seed: int) -> None:
    chance, taken = random.Random(seed), 0
    tokens = [
        b"[",
        b"]",
        b"{",
        b'"',
        b"'",
        b"=",
        b"\n",
        b".",
        b"#",
        b"\\",
        b"0x",
        b"-1",
        b"inf",
        b"version",
        b'"""',
    ]
    for _ in range(rounds):
        text = bytearray(GOOD)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(text))
            match chance.randrange(4):
                case 0:
                    text[at] = chance.randrange(256)
                case 1:
                    del text[at : at + chance.randrange(1, 20)]
                case 2:
                    text[at:at] = chance.choice(tokens)
                case _:
                    text[at:at] = text[: chance.randrange(len(text))]
        taken += read_or_refuse(bytes(text))
    assert 0 < taken < rounds


def test_100_000_mutations_crash_nothing() -> None:
    fuzz(100_000, seed=4)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_million_mutations_crash_nothing() -> None:
    fuzz(1_000_000, seed=5)


@pytest.mark.parametrize("text", [None, 5, "", "g" * 32, str(SHELL).upper(), f" {SHELL}", "0" * 32])
def test_what_is_not_a_uuid(text: object) -> None:
    with pytest.raises(ConfigError):
        parse_uuid(text)
