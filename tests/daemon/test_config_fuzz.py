"""Configuration files with anything in them: a typed error of one line, or what plain TOML says they mean."""

from __future__ import annotations

import os
import random
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hillinfer_core.errors import ConfigError
from hillinferd import config

GOOD = b"""
runtime_dir = "/run/hillinfer"
state_dir = "/var/lib/hillinfer"
session_limit = 64
attach_users = [1000, 1001]
user_weights = {"1000" = 2.0}
log_level = "info"

[[drive]]
name = "nvme"
pool = "/var/lib/hillinfer/pool"
pool_capacity = "64GiB"

[[drive]]
name = "card"
driver = "xrt"
pool = "/var/lib/hillinfer/other"
pool_capacity = 1073741824
card = "0000:3b:00.1"
bitstream = "/etc/hillinfer/kernel.xclbin"
"""

PIECES = [b"[", b"]", b"{", b'"', b"'", b"=", b"\n", b".", b"#", b"\\", b"0x", b"-1", b"inf", b"nan", b"true",
          b"drive", b'"""', b"1e400", b"GiB", b"\x00", b"9" * 30]  # fmt: skip


@pytest.fixture(scope="module")
def in_memory() -> Iterator[Path]:
    """A file that no disk sees: to rewrite one 100,000 times on a disk takes minutes of waiting."""
    descriptor = os.memfd_create("hillinferd.toml")
    yield Path(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)


def read_or_refuse(file: Path, text: bytes) -> bool:
    """Return whether it was accepted, and check what was made of it."""
    file.write_bytes(text)
    found: config.Config | None = None
    refused = ""
    try:
        found = config.load(file, {})
    except ConfigError as error:
        refused = str(error)
    if found is None:
        assert refused
        assert "\n" not in refused
        return False
    says = tomllib.loads(text.decode())
    tables = says.pop("drive", [says])
    assert len(found.drives) == len(tables)
    for drive, table in zip(found.drives, tables, strict=True):
        if "pool" in table:
            assert drive.pool == Path(table["pool"]).expanduser().absolute()
        if "driver" in table:
            assert drive.driver == table["driver"]
        if isinstance(table.get("pool_capacity"), int):
            assert drive.pool_capacity == table["pool_capacity"]
        assert drive.pool_capacity >= config.SMALLEST_POOL
    assert found.limits.session_limit == says.get("session_limit", found.limits.session_limit)
    assert found.limits.session_limit >= 1
    assert all(0.01 <= weight <= 100 for weight in found.limits.user_weights.values())
    assert found.log_level in config.LEVELS
    return True


def fuzz(file: Path, rounds: int, seed: int) -> None:
    chance, taken = random.Random(seed), 0
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
                    text[at:at] = chance.choice(PIECES)
                case _:
                    text[at:at] = text[: chance.randrange(len(text))]
        taken += read_or_refuse(file, bytes(text))
    assert 0 < taken < rounds


def test_the_file_itself_is_accepted(in_memory: Path) -> None:
    assert read_or_refuse(in_memory, GOOD)


@given(text=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode())))
@settings(max_examples=200, deadline=None)
def test_garbage_is_a_typed_error(text: bytes, in_memory: Path) -> None:
    read_or_refuse(in_memory, text)


def test_100_000_mutations_crash_nothing(in_memory: Path) -> None:
    fuzz(in_memory, 100_000, seed=6)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_million_mutations_crash_nothing(in_memory: Path) -> None:
    fuzz(in_memory, 1_000_000, seed=7)
