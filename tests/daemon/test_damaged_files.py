"""Flipped bits and cut files under a durable context: seen every time, and never other bytes for its own."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from raw_client import RawClient, Refused, log_of, random_rows, running_daemon, spawn

from hillinfer_core.errors import HillInferError
from hillinfer_core.layout import DType, Precision, Shape
from hillinferd.driver.storage import Storage
from hillinferd.records.check import check
from hillinferd.records.database import Database
from hillinferd.records.durable import DurableRecords

SHAPE = Shape(2, 2, 64, DType.float16, Precision.int4)
TOKENS, TAIL = 400, 7
ROWS = [random_rows(np.random.default_rng(layer), SHAPE, TOKENS + TAIL) for layer in range(SHAPE.layers)]


def flags(directory: Path) -> tuple[str, ...]:
    return ("--pool", str(directory / "pool"), "--pool-capacity", "4MiB")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pool and catalogue of one saved context."""
    directory = tmp_path_factory.mktemp("o")
    with running_daemon(directory / "r", *flags(directory)), RawClient(directory / "r") as client:
        context = client.open_named(SHAPE, durable_name="book").context_id
        for layer, rows in enumerate(ROWS):
            client.append(context, layer, 0, rows[:, :TOKENS])
            client.append(context, layer, TOKENS, rows[:, TOKENS:], tail=True)
        client.save(context)
    return directory


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    for file in original.glob("pool*"):
        shutil.copy(file, tmp_path)
    return tmp_path


def content(directory: Path) -> list[bytes]:
    """Every byte of the context as a reader would get it; raises what a reader would be told."""
    storage = Storage(directory / "pool", 0, keep=True)
    try:
        database = Database(directory / "pool.catalogue")
        try:
            records = DurableRecords(database)
            report, _ = check(storage, records)
            (found,) = report.contexts
            if found.problem or found.damaged_rows:
                raise HillInferError(f"{found}")
            (durable,) = records.load()
            parts = [records.tail(durable, layer) for layer in range(SHAPE.layers)]
            for layer in durable.layers:
                for head in range(SHAPE.kv_heads):
                    for placed in layer.placed:
                        tokens = min(placed.end_token, layer.tokens) - placed.first_token
                        part = bytearray(tokens * SHAPE.row_bytes)
                        offset = placed.row_offset(head, placed.first_token, SHAPE.row_bytes)
                        storage.read(offset, memoryview(part))
                        parts.append(bytes(part))
            parts.append(b"mended" * found.damaged_keys)
            return parts
        finally:
            database.close()
    finally:
        storage.close()


def outcomes(directory: Path, name: str, damage: Callable[[bytearray], bytes], count: int) -> Counter[str]:
    good, pristine = content(directory), {file: file.read_bytes() for file in directory.glob("pool*")}
    seen: Counter[str] = Counter()
    for _ in range(count):
        (directory / name).write_bytes(damage(bytearray(pristine[directory / name])))
        try:
            found = content(directory)
        except HillInferError as error:
            seen[type(error).__name__] += 1
        else:
            # Keys are made anew from the rows; any other byte must be as it was.
            assert found[:-1] == good[:-1]
            seen["keys to be made anew" if found[-1] else "nothing that is used"] += 1
        for file in directory.glob("pool*"):
            file.write_bytes(pristine[file]) if file in pristine else file.unlink()
    print(f"\n{name}: {dict(seen)}")
    return seen


def flip(rng: random.Random, first: int = 0, end: int | None = None) -> Callable[[bytearray], bytes]:
    def damage(data: bytearray) -> bytes:
        at = rng.randrange(first, end or len(data))
        data[at] ^= 1 << rng.randrange(8)
        return bytes(data)

    return damage


def cut(rng: random.Random) -> Callable[[bytearray], bytes]:
    return lambda data: bytes(data[: rng.randrange(len(data))])


def test_every_flipped_bit_of_the_pool_is_seen(copy: Path) -> None:
    used = 64 * 1024 * 8
    seen = outcomes(copy, "pool", flip(random.Random(1), 64 * 1024, used), 150)
    assert seen["HillInferError"] > 60
    assert seen["keys to be made anew"] > 0
    header = outcomes(copy, "pool", flip(random.Random(2), 0, 64), 20)
    assert header.total() == 20 - header["nothing that is used"]


def test_every_flipped_bit_of_the_catalogue_is_seen(copy: Path) -> None:
    seen = outcomes(copy, "pool.catalogue", flip(random.Random(3)), 300)
    assert seen["DamagedCatalogue"] > 50
    assert outcomes(copy, "pool.catalogue.sequence", flip(random.Random(4)), 20)["DamagedCatalogue"] == 20


def test_every_cut_is_seen(copy: Path) -> None:
    for name, count in (("pool", 20), ("pool.catalogue", 40), ("pool.catalogue.sequence", 8)):
        seen = outcomes(copy, name, cut(random.Random(5)), count)
        assert seen["nothing that is used"] == 0


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_flipped_bits(copy: Path) -> None:
    outcomes(copy, "pool", flip(random.Random(6)), 5000)
    outcomes(copy, "pool.catalogue", flip(random.Random(7)), 20000)


def test_commits_that_the_log_lost_are_missed(copy: Path) -> None:
    database = Database(copy / "pool.catalogue")
    database.close()
    before = (copy / "pool.catalogue").read_bytes()
    database = Database(copy / "pool.catalogue")
    database.bind("another")
    database.close()
    (copy / "pool.catalogue").write_bytes(before)
    with pytest.raises(HillInferError, match="last commits are missing"):
        Database(copy / "pool.catalogue")
    Database(copy / "pool.catalogue", salvage=True).close()
    Database(copy / "pool.catalogue").close()


@pytest.mark.parametrize(("name", "byte"), [("pool", 60), ("pool.catalogue", 16)])
def test_the_daemon_does_not_start_on_what_is_damaged(copy: Path, name: str, byte: int) -> None:
    data = bytearray((copy / name).read_bytes())
    data[byte] ^= 0x10
    (copy / name).write_bytes(data)
    (copy / "r").mkdir()
    process = spawn(copy / "r", *flags(copy))
    try:
        assert process.wait(60) == 1
    finally:
        process.kill()
    last = log_of(copy / "r").strip().splitlines()[-1]
    assert last.startswith("hillinferd: ")
    assert "damaged" in last


def test_a_damaged_row_is_an_error_and_nothing_else_suffers(copy: Path) -> None:
    data = bytearray((copy / "pool").read_bytes())
    row = ROWS[1][1, 300].tobytes()
    data[data.index(row)] ^= 1
    (copy / "pool").write_bytes(data)
    with running_daemon(copy / "r", *flags(copy)), RawClient(copy / "r") as client:
        context = client.open_named(SHAPE, base_name="book").context_id
        with pytest.raises(Refused, match="token 300 of head 1") as caught:
            client.fetch_range(context, SHAPE, 1, 0, TOKENS)
        assert caught.value.error == "CorruptData"
        np.testing.assert_array_equal(client.fetch_range(context, SHAPE, 0, 0, TOKENS), ROWS[0][:, :TOKENS])


def test_damaged_keys_are_made_anew_from_the_rows(copy: Path) -> None:
    query = np.random.default_rng(3).standard_normal((2, 64)).astype(np.float32)

    def ranked(runtime_dir: Path) -> list[np.ndarray]:
        with running_daemon(runtime_dir, *flags(copy)), RawClient(runtime_dir) as client:
            context = client.open_named(SHAPE, base_name="book").context_id
            return list(client.evaluate(context, SHAPE, 0, query, 50, 0, TOKENS)[:2])

    before = ranked(copy / "r1")
    storage = Storage(copy / "pool", 0, keep=True)
    database = Database(copy / "pool.catalogue")
    (durable,) = DurableRecords(database).load()
    offset = durable.layers[0].placed[0].keys_offset(SHAPE)
    database.close()
    storage.close()
    data = bytearray((copy / "pool").read_bytes())
    data[offset + 100] ^= 4
    (copy / "pool").write_bytes(data)
    after = ranked(copy / "r2")
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1], before[1])
    assert (copy / "pool").read_bytes()[offset + 100] == data[offset + 100] ^ 4
