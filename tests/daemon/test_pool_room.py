"""A pool or memory for evaluation keys that is full, a drive that fails or returns other bytes."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import grpc
import pytest
from one_context import QUERY, ROWS, SHAPE, check, fill
from raw_client import RawClient, Refused, running_daemon

from hillinfer_core.v1 import cold_pool_pb2 as pb


def test_a_full_pool_is_an_error_and_freeing_makes_room(runtime_dir: Path) -> None:
    with running_daemon(runtime_dir, "--pool-capacity", "1MiB"), RawClient(runtime_dir) as client:
        context = fill(client, 1024)
        before = client.status()
        with pytest.raises(Refused, match="pool_capacity") as caught:
            client.append(context, 0, 1024, ROWS[:, 1024:2048])
        assert caught.value.error == "PoolFull"
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert client.status().pool == before.pool
        check(client, context)
        client.call("CloseContext", pb.CloseContextRequest(context_id=context))
        check(client, fill(client, 1024))


def test_a_failed_write_gives_its_space_back(runtime_dir: Path) -> None:
    pool = runtime_dir / "pool"
    flags = ("--pool", str(pool), "--pool-capacity", "64MiB")
    with running_daemon(runtime_dir, *flags), RawClient(runtime_dir) as client:
        context = fill(client, 256)
        before, blocks = client.status(), pool.stat().st_blocks
        # The worker's next extents begin below this limit on a file's size and end above it.
        limit = before.pool.used_bytes + (512 << 10)
        pid = before.device.worker_pid
        unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        with pytest.raises(Refused, match="drive failed") as caught:
            client.append(context, 0, 256, ROWS[:, 256:])
        assert caught.value.error == "DeviceUnavailable"
        after = client.status()
        assert after.device.written_bytes == before.device.written_bytes
        assert after.pool == before.pool
        assert pool.stat().st_blocks == blocks
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
        client.append(context, 0, 256, ROWS[:, 256:])
        check(client, context)


def test_evaluation_keys_stay_within_their_limit(runtime_dir: Path) -> None:
    limit = 1024 * 2 * 64 // 2
    flags = ("--evaluation-keys-dram", str(limit))
    with running_daemon(runtime_dir, *flags), RawClient(runtime_dir) as client:
        context = fill(client, 1024)
        assert client.status().device.evaluation_key_bytes == limit
        before = client.status().device
        # Sealed keys make room for those that are not in the pool yet, and are streamed from it instead.
        client.append(context, 0, 1024, ROWS[:, 1024:2048])
        assert client.status().device.evaluation_key_bytes <= limit
        client.evaluate(context, SHAPE, 0, QUERY, 8, 0, 2048)
        after = client.status().device
        assert after.streamed_bytes >= before.streamed_bytes + limit
        assert after.evaluation_key_bytes <= limit


def test_unsealed_evaluation_keys_that_cannot_fit_are_refused(runtime_dir: Path) -> None:
    flags = ("--evaluation-keys-dram", str(128 * 2 * 64 // 2))
    with running_daemon(runtime_dir, *flags), RawClient(runtime_dir) as client:
        context = fill(client, 128)
        before = client.status().pool
        with pytest.raises(Refused, match="evaluation_keys_dram") as caught:
            client.append(context, 0, 128, ROWS[:, 128:144])
        assert caught.value.error == "MemoryLimit"
        assert client.status().pool == before


def test_damage_on_the_drive_is_seen_before_it_is_used(runtime_dir: Path) -> None:
    pool = runtime_dir / "pool"
    flags = ("--pool", str(pool), "--pool-capacity", "16MiB")
    with running_daemon(runtime_dir, *flags), RawClient(runtime_dir) as client:
        context = fill(client)
        row = ROWS[1, 1234].tobytes()
        offset = pool.read_bytes().index(row)
        with pool.open("r+b") as file:
            file.seek(offset + 7)
            file.write(bytes([row[7] ^ 1]))
            os.fsync(file.fileno())
        for damaged in (
            lambda: client.fetch_ids(context, SHAPE, 0, [[5], [1234]]),
            lambda: client.fetch_range(context, SHAPE, 0, 1000, 500),
            lambda: client.evaluate(context, SHAPE, 0, QUERY, 2048, 0, 2048, room=4096),
        ):
            with pytest.raises(Refused, match="token 1234 of head 1") as caught:
                damaged()
            assert caught.value.error == "CorruptData"
            assert caught.value.code is grpc.StatusCode.DATA_LOSS
        check(client, context)
    again = runtime_dir / "again"
    with running_daemon(again, *flags), RawClient(again) as client:
        assert client.status().pool.used_bytes == 0
    assert pool.stat().st_blocks * 512 <= 64 << 10
