"""Durable contexts over the real sockets: begun, continued, saved, shared, deleted, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from raw_client import RawClient, Refused, random_rows, running_daemon, wait_for

from hillinfer_core.layout import DType, Precision, Shape
from hillinferd.domain.durable import MAX_APPEND_ROWS

SHAPE = Shape(2, 2, 64, DType.float16, Precision.int4)
RNG = np.random.default_rng(11)
TOKENS = 1500
ROWS = [random_rows(RNG, SHAPE, TOKENS) for _ in range(SHAPE.layers)]
QUERY = RNG.standard_normal((4, 64)).astype(np.float32)
LABELS = {"model": "tiny", "text": "abc"}
FLUSHED = TOKENS // 16 * 16


def fill(client: RawClient, context: int, first: int = 0, end: int = FLUSHED) -> None:
    for layer, rows in enumerate(ROWS):
        client.append(context, layer, first, rows[:, first:end])


def check(client: RawClient, context: int, end: int = FLUSHED) -> None:
    for layer, rows in enumerate(ROWS):
        found = client.fetch_range(context, SHAPE, layer, 0, end)
        np.testing.assert_array_equal(found, rows[:, :end])


def ranking(client: RawClient, context: int, end: int = FLUSHED) -> list[np.ndarray]:
    return [
        part
        for layer in range(SHAPE.layers)
        for part in client.evaluate(context, SHAPE, layer, QUERY, 50, 3, end)[:2]
    ]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def ctl(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hillinferd.ctl", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def flags(directory: Path) -> tuple[str, ...]:
    return ("--pool", str(directory / "pool"), "--pool-capacity", "64MiB")


@pytest.fixture
def durable(runtime_dir: Path) -> Iterator[Path]:
    """The runtime directory of a daemon that keeps contexts in `pool` beside its sockets."""
    with running_daemon(runtime_dir, *flags(runtime_dir)):
        yield runtime_dir


def restarted_worker(client: RawClient) -> bool:
    now = client.status()
    return now.device.worker_restarts > 0 and now.drives[0].state == "serving"


def restarted(runtime_dir: Path, number: int) -> tuple[Path, tuple[str, ...]]:
    """Runtime directory and flags of another daemon on the same pool."""
    return runtime_dir / f"again{number}", flags(runtime_dir)


def test_what_was_appended_outlives_its_session_and_can_be_continued(durable: Path) -> None:
    with RawClient(durable) as client:
        opened = client.open_named(SHAPE, durable_name="book", labels=LABELS)
        assert list(opened.layer_tokens) == [0, 0]
        fill(client, opened.context_id, 0, 1024)
    with RawClient(durable) as client:
        wait_for(lambda: client.durable()["book"].users == 0, 60)
        opened = client.open_named(SHAPE, durable_name="book", labels=LABELS)
        assert list(opened.layer_tokens) == [1024, 1024]
        check(client, opened.context_id, 1024)
        fill(client, opened.context_id, 1024)
        check(client, opened.context_id)
        volatile = client.open(SHAPE)
        fill(client, volatile, 0, 1024)
        fill(client, volatile, 1024)
        same(ranking(client, opened.context_id), ranking(client, volatile))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_saved_context_is_there_after_a_restart(runtime_dir: Path, number: int) -> None:
    with running_daemon(runtime_dir, *flags(runtime_dir)) as process:
        with RawClient(runtime_dir) as client:
            context = client.open_named(SHAPE, durable_name="book", labels=LABELS).context_id
            fill(client, context)
            for layer, rows in enumerate(ROWS):
                client.append(context, layer, FLUSHED, rows[:, FLUSHED:], tail=True)
            before = ranking(client, context)
            client.save(context)
            same(ranking(client, context), before)
        process.send_signal(number)
        process.wait(60)
    again, same_flags = restarted(runtime_dir, 1)
    with running_daemon(again, *same_flags), RawClient(again) as one, RawClient(again) as two:
        listed = one.durable()["book"]
        assert (listed.saved, listed.tokens, dict(listed.labels)) == (True, TOKENS, LABELS)
        contexts = []
        for client in (one, two):
            opened = client.open_named(SHAPE, base_name="book", labels=LABELS)
            assert list(opened.layer_tokens) == [FLUSHED] * 2
            assert list(opened.tail_tokens) == [TOKENS - FLUSHED] * 2
            contexts.append(opened.context_id)
            check(client, opened.context_id)
            same(ranking(client, opened.context_id), before)
            for layer, rows in enumerate(ROWS):
                tail = client.fetch_tail(opened.context_id, SHAPE, layer, TOKENS - FLUSHED)
                np.testing.assert_array_equal(tail, rows[:, FLUSHED:])
        # Each goes on alone: neither the other nor the saved context sees it.
        extra = random_rows(RNG, SHAPE, 512)
        one.append(contexts[0], 0, FLUSHED, extra)
        two.append(contexts[1], 0, FLUSHED, extra[:, :16][:, ::-1].copy())
        np.testing.assert_array_equal(one.fetch_range(contexts[0], SHAPE, 0, FLUSHED, 512), extra)
        np.testing.assert_array_equal(
            one.fetch_range(contexts[0], SHAPE, 0, 0, FLUSHED), ROWS[0][:, :FLUSHED]
        )
        np.testing.assert_array_equal(
            two.fetch_range(contexts[1], SHAPE, 0, FLUSHED, 16), extra[:, :16][:, ::-1]
        )
        ids, *_ = one.evaluate(contexts[0], SHAPE, 0, QUERY, FLUSHED + 512, 0, FLUSHED + 512)
        np.testing.assert_array_equal(ids[0], np.arange(FLUSHED + 512))
        with pytest.raises(Refused, match="2 contexts begin with"):
            one.delete("book")
        for client, context in zip((one, two), contexts, strict=True):
            client.close_context(context)
        used = one.status().pool.used_bytes
        assert one.delete("book") == used
        assert one.status().pool.used_bytes == 0
        assert one.durable() == {}


def test_a_dead_worker_costs_a_durable_context_nothing(durable: Path) -> None:
    with RawClient(durable) as client:
        context = client.open_named(SHAPE, durable_name="book").context_id
        fill(client, context, 0, 1024)
        before = client.status().device
        os.kill(before.worker_pid, signal.SIGKILL)
        wait_for(lambda: restarted_worker(client), 60)
        check(client, context, 1024)
        fill(client, context, 1024)
        check(client, context)
        client.save(context)
        client.close_context(context)
        reader = client.open_named(SHAPE, base_name="book").context_id
        check(client, reader)


def test_keys_beyond_memory_are_streamed_for_durable_contexts_too(runtime_dir: Path) -> None:
    small = (*flags(runtime_dir), "--evaluation-keys-dram", "256KiB")
    with running_daemon(runtime_dir, *small), RawClient(runtime_dir) as client:
        context = client.open_named(SHAPE, durable_name="book").context_id
        fill(client, context)
        volatile = client.open(SHAPE)
        for layer, rows in enumerate(ROWS):
            client.append(volatile, layer, 0, rows[:, :FLUSHED])
        before = ranking(client, volatile)
        same(ranking(client, context), before)
        client.save(context)
        client.close_context(context)
        reader = client.open_named(SHAPE, base_name="book").context_id
        same(ranking(client, reader), before)
        device = client.status().device
        assert device.streamed_bytes > 0
        assert device.evaluation_key_bytes <= 256 << 10


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": {"model": "other", "text": "abc"}}, "differs in model: it has tiny, not other"),
        ({"labels": {"model": "tiny"}}, "differs in text: it has abc, not none"),
        ({"shape": Shape(2, 2, 64, DType.bfloat16, Precision.int4)}, "differs in dtype"),
        ({"shape": Shape(2, 2, 64, DType.float16, Precision.int8)}, "differs in precision"),
        ({"shape": Shape(3, 2, 64, DType.float16, Precision.int4)}, "differs in layers: it has 2, not 3"),
    ],
)
def test_a_context_that_does_not_match_is_refused(durable: Path, change: dict, says: str) -> None:
    with RawClient(durable) as client:
        context = client.open_named(SHAPE, durable_name="book", labels=LABELS).context_id
        fill(client, context)
        client.save(context)
        with pytest.raises(Refused, match=says) as caught:
            client.open_named(
                change.get("shape", SHAPE), base_name="book", labels=change.get("labels", LABELS)
            )
        assert caught.value.error == "ContextMismatch"


def test_what_cannot_be_done_with_durable_contexts(durable: Path) -> None:
    with RawClient(durable) as client, RawClient(durable) as other:
        context = client.open_named(SHAPE, durable_name="book").context_id
        before = client.status().pool

        def refused(error: str, says: str, call: object, *arguments: object, **named: object) -> None:
            with pytest.raises(Refused, match=says) as caught:
                call(*arguments, **named)  # type: ignore[operator]
            assert caught.value.error == error

        refused("ContextInUse", "being written", other.open_named, SHAPE, durable_name="book")
        refused("ContextInUse", "not saved", other.open_named, SHAPE, base_name="book")
        refused("ContextInUse", "being written", other.delete, "book")
        refused("UnknownContext", "no context 'none'", other.open_named, SHAPE, base_name="none")
        refused("InvalidInput", "printable", other.open_named, SHAPE, durable_name=" book")
        refused("InvalidInput", "printable", other.open_named, SHAPE, durable_name="b" * 129)
        refused("InvalidInput", "empty", other.open_named, SHAPE, durable_name="")
        refused(
            "InvalidInput", "label 'k'", other.open_named, SHAPE, durable_name="a", labels={"k": 257 * "v"}
        )
        many = Shape(1, 1024, 8, DType.float16, Precision.int4)
        refused("InvalidInput", "too many", other.open_named, many, durable_name="a")
        client.append(context, 0, 0, ROWS[0][:, :16])
        refused("InvalidInput", "0 to 16 tokens", client.save, context)
        refused("InvalidInput", "1 to 15 tokens", client.append, context, 0, 16, ROWS[0][:, :16], tail=True)
        refused(
            "OutOfOrder", "tail cannot start at 0", client.append, context, 0, 0, ROWS[0][:, :3], tail=True
        )
        volatile = client.open(SHAPE)
        refused("InvalidInput", "volatile", client.save, volatile)
        refused("InvalidInput", "durable", client.append, volatile, 0, 0, ROWS[0][:, :3], tail=True)
        client.append(context, 1, 0, ROWS[1][:, :16])
        client.save(context)
        client.save(context)
        refused("ContextInUse", "saved", client.append, context, 0, 16, ROWS[0][:, 16:32])
        refused("ContextInUse", "saved", client.append, context, 0, 16, ROWS[0][:, 16:19], tail=True)
        refused("ContextInUse", "saved", other.open_named, SHAPE, durable_name="book")
        assert set(client.durable()) == {"book"}
        assert before.used_bytes == 0


def test_without_a_named_pool_nothing_is_durable(daemon: Path) -> None:
    with RawClient(daemon) as client:
        for kind in ({"durable_name": "book"}, {"base_name": "book"}):
            with pytest.raises(Refused, match="--pool"):
                client.open_named(SHAPE, **kind)


def test_quotas_of_users_and_contexts(runtime_dir: Path) -> None:
    config = runtime_dir / "hillinferd.toml"
    config.write_text('user_quota = "1MiB"\ncontext_quota = "512KiB"\n')
    with (
        running_daemon(runtime_dir, "--config", str(config), *flags(runtime_dir)),
        RawClient(runtime_dir) as client,
    ):
        context = client.open_named(SHAPE, durable_name="book").context_id
        client.append(context, 0, 0, ROWS[0][:, :512])
        with pytest.raises(Refused, match="context_quota"):
            client.append(context, 1, 0, ROWS[1][:, :512])
        volatile = client.open(SHAPE)
        client.append(volatile, 0, 0, ROWS[0][:, :512])
        third = client.open(SHAPE)
        with pytest.raises(Refused, match="user_quota"):
            client.append(third, 0, 0, ROWS[0][:, :512])
        client.close_context(volatile)
        client.append(third, 0, 0, ROWS[0][:, :512])


def test_contexts_are_listed_deleted_and_checked_from_the_command_line(runtime_dir: Path) -> None:
    socket = ("--socket", str(runtime_dir / "attach.sock"))
    pool = runtime_dir / "pool"
    with running_daemon(runtime_dir, *flags(runtime_dir)):
        with RawClient(runtime_dir) as client:
            for name in ("one", "two"):
                context = client.open_named(SHAPE, durable_name=name, labels=LABELS).context_id
                fill(client, context)
                client.save(context)
            assert (
                "closed or in use" in (busy := ctl("contexts", "delete", "one", *socket)).stderr
                or busy.returncode
            )
        listed = json.loads(ctl("contexts", "--json", *socket).stdout)["contexts"]
        assert [(item["name"], item["labels"], item["saved"]) for item in listed] == [
            ("one", LABELS, True),
            ("two", LABELS, True),
        ]
        assert "deleted one" in ctl("contexts", "delete", "one", *socket).stdout
        gone = ctl("contexts", "delete", "one", *socket)
        assert gone.returncode == 1
        assert gone.stderr.startswith("hillinferctl: there is no context 'one'")
        assert "in use by another daemon" in ctl("fsck", str(pool)).stderr
    clean = ctl("fsck", str(pool), "--json")
    report = json.loads(clean.stdout)
    assert clean.returncode == 0
    assert report["clean"]
    assert [(item["name"], item["rows"]) for item in report["contexts"]] == [("two", 2 * 2 * FLUSHED)]


def test_an_append_as_large_as_allowed_has_an_answer_of_any_size(durable: Path) -> None:
    # The narrower the rows, the more of them, and of their checksums, in one append.
    shape = Shape(1, 64, 8, DType.float16, Precision.int4)
    with RawClient(durable, 20 << 20) as client:
        opened = client.open_named(shape, durable_name="wide")
        assert opened.append_limit * shape.kv_heads == MAX_APPEND_ROWS
        rows = random_rows(RNG, shape, opened.append_limit)
        assert client.append(opened.context_id, 0, 0, rows).layer_tokens == opened.append_limit
        found = client.fetch_range(opened.context_id, shape, 0, 0, 100)
        np.testing.assert_array_equal(found, rows[:, :100])
        with pytest.raises(Refused, match="at most"):
            client.append(
                opened.context_id,
                0,
                opened.append_limit,
                np.repeat(rows, 2, axis=1)[:, : opened.append_limit + shape.append_unit],
                whole=True,
            )


def test_recycled_space_shows_nothing_of_whoever_had_it(durable: Path) -> None:
    with RawClient(durable) as first, RawClient(durable) as second:
        secret = first.open(SHAPE)
        fill(first, secret)
        row = ROWS[0][1, 700].tobytes()
        pool = durable / "pool"
        assert row in pool.read_bytes()
        first.close_context(secret)
        assert row not in pool.read_bytes()
        context = second.open(SHAPE)
        second.append(context, 0, 0, ROWS[1][:, :16])
        with pytest.raises(Refused, match="held by layer 0"):
            second.fetch_range(context, SHAPE, 0, 0, 256)
        with pytest.raises(Refused, match="does not exist"):
            second.fetch_ids(context, SHAPE, 0, [[16], [0]])
        with pytest.raises(Refused, match="held by layer 0"):
            second.evaluate(context, SHAPE, 0, QUERY, 1, 0, 256)


def test_an_empty_file_becomes_a_pool(runtime_dir: Path) -> None:
    pool, configuration = runtime_dir / "pool", runtime_dir / "hillinferd.toml"
    pool.touch()
    configuration.write_text(f'pool = "{pool}"\n')
    with running_daemon(runtime_dir, "--config", str(configuration)), RawClient(runtime_dir) as client:
        assert 0 < client.status().pool.capacity_bytes < pool.stat().st_size


def test_an_idle_daemon_ends_when_told_to(runtime_dir: Path) -> None:
    with running_daemon(runtime_dir, "--exit-when-idle", "1", *flags(runtime_dir)) as process:
        with RawClient(runtime_dir) as client:
            assert client.status().drives[0].state == "serving"
        assert process.wait(60) == 0
