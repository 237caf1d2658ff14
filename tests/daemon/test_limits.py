"""Quotas and weights: who is refused what, and what changes while the daemon runs."""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from raw_client import RawClient, Refused, random_rows, wait_for
from service_thread import Served, drive_settings, served

from hillinfer_core.errors import ConfigError
from hillinfer_core.layout import DType, Precision, Shape
from hillinfer_core.v1 import cold_pool_pb2 as pb
from hillinferd import config
from hillinferd.domain.placement import extent_bytes, next_tokens
from hillinferd.service.limits import Limits
from hillinferd.service.work_queue import Piece, Priority

SHAPE = Shape(1, 2, 64, DType.float16, Precision.int8)
ROWS = random_rows(np.random.default_rng(0), SHAPE, 64)
ME = os.getuid()


def apply(service: Served, **limits: object) -> None:
    service.run(lambda: service.service.apply_limits(Limits(**limits)))  # type: ignore[arg-type]


def refused(call: object, says: str) -> None:
    with pytest.raises(Refused, match=says) as caught:
        call()  # type: ignore[operator]
    assert caught.value.error == "QuotaExceeded"
    assert caught.value.code in (grpc.StatusCode.RESOURCE_EXHAUSTED, None)


def fill(client: RawClient, context: int) -> None:
    for first in range(64, 1 << 14, 64):
        client.append(context, 0, first, ROWS)


def test_limits_come_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "hillinferd.toml"
    me, mine = pwd.getpwuid(ME).pw_name, grp.getgrgid(os.getgid()).gr_name
    file.write_text(
        'session_quota = "3GiB"\nuser_session_limit = 4\nuser_request_limit = 9\nuser_context_limit = 7\n'
        f"[user_weights]\n{me} = 4\n12345 = 0.5\n[group_weights]\n{mine} = 2\n"
    )
    limits = config.load(file, {}).limits
    assert (limits.session_quota, limits.user_session_limit, limits.user_request_limit) == (3 << 30, 4, 9)
    assert limits.quotas.session == 3 << 30
    assert limits.quotas.user_contexts == 7
    assert limits.arena_limit == Limits().arena_limit
    assert limits.user_weights == {ME: 4.0, 12345: 0.5}
    assert limits.group_weights == {os.getgid(): 2.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("user_request_limit = 0", "user_request_limit: 0 is not allowed"),
        ("user_weights = 3", "user_weights: 3 is not allowed"),
        ("[user_weights]\nroot = 0", "root has weight 0"),
        ('[user_weights]\nroot = "2"', "root has weight '2'"),
        ("[user_weights]\nnobody-of-this-name = 1", "not known to this machine"),
        ("[group_weights]\nroot = 1000", "0.01 to 100"),
        ('attach_users = "root"', "a list of names or numbers of users"),
        ("attach_groups = [-1]", "a list of names or numbers of groups"),
        ('admin_groups = ["nobody-of-this-name"]', "not known to this machine"),
    ],
)
def test_limits_that_cannot_be(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "hillinferd.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        config.load(file, {})


def test_who_may_attach_and_administer_comes_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "hillinferd.toml"
    nobody = pwd.getpwnam("nobody")
    group = grp.getgrgid(nobody.pw_gid).gr_name
    file.write_text(
        f'attach_users = ["nobody", 12345]\nattach_groups = ["{group}"]\nadmin_groups = [54321]\n'
    )
    limits = config.load(file, {}).limits
    assert limits.attach_users == {nobody.pw_uid, 12345}
    assert limits.attach_groups == {nobody.pw_gid}
    assert limits.admin_groups == {54321}


def test_without_lists_all_attach_and_only_root_and_the_daemons_user_administer() -> None:
    assert Limits().may_attach(3_999_999)
    assert [Limits().may_administer(uid) for uid in (0, ME, 3_999_999)] == [True, True, False]
    nobody = pwd.getpwnam("nobody")
    only = Limits(attach_users=frozenset({3_999_999}))
    assert [only.may_attach(uid) for uid in (3_999_999, 0, ME, nobody.pw_uid)] == [True, True, True, False]
    assert Limits(attach_groups=frozenset({nobody.pw_gid})).may_attach(nobody.pw_uid)
    assert not Limits(attach_groups=frozenset({nobody.pw_gid})).may_attach(3_999_999)
    trusted = Limits(attach_users=frozenset({1}), admin_groups=frozenset({nobody.pw_gid}))
    assert trusted.may_administer(nobody.pw_uid)
    assert trusted.may_attach(nobody.pw_uid)
    assert not trusted.may_administer(1) or ME == 1


def test_a_users_weight_goes_before_that_of_the_groups_and_the_greatest_of_those_counts() -> None:
    group = pwd.getpwuid(ME).pw_gid
    assert Limits().weight_of(ME) == 1
    assert Limits(user_weights={ME: 3}, group_weights={group: 5}).weight_of(ME) == 3
    assert Limits(user_weights={ME + 1: 3}, group_weights={group: 5, group + 1: 9}).weight_of(ME) == 5
    assert Limits(group_weights={group: 5}).weight_of(3_999_999) == 1


def test_every_limit_refuses_what_is_above_it_and_says_which_it_is(runtime_dir: Path) -> None:
    with served(runtime_dir, drive_settings("one", runtime_dir / "pool")) as service, ExitStack() as stack:
        first = stack.enter_context(RawClient(runtime_dir))
        context = first.open(SHAPE)

        apply(service, user_session_limit=1)
        refused(lambda: RawClient(runtime_dir), "user_session_limit")
        apply(service, session_limit=1)
        refused(lambda: RawClient(runtime_dir), "raise session_limit")
        apply(service, arena_limit=1 << 20)
        refused(lambda: RawClient(runtime_dir), "arena_limit")

        apply(service, session_context_limit=1)
        refused(lambda: first.open(SHAPE), "this session has 1 contexts open .* session_context_limit")
        second = stack.enter_context(RawClient(runtime_dir))
        other = second.open(SHAPE)
        apply(service, user_context_limit=2)
        refused(lambda: second.open(SHAPE), "this user has 2 contexts open .* user_context_limit")
        second.close_context(other)
        other = second.open(SHAPE)

        first.append(context, 0, 0, ROWS)
        used = first.status().pool.used_bytes
        for name in ("session_quota", "user_quota", "context_quota"):
            apply(service, **{name: used})
            refused(partial(fill, first, context), name)
            # What is there stays, what was refused changed nothing, and others are not concerned.
            assert first.status().pool.used_bytes == used
            apply(service)
            first.close_context(context)
            context = first.open(SHAPE)
            first.append(context, 0, 0, ROWS)
        apply(service, session_quota=used)
        second.append(other, 0, 0, ROWS)
        np.testing.assert_array_equal(first.fetch_range(context, SHAPE, 0, 0, 64), ROWS)


@pytest.mark.parametrize("name", ["session_quota", "user_quota", "context_quota"])
def test_what_is_kept_aside_counts_too(runtime_dir: Path, name: str) -> None:
    tail, aside = ROWS[:, :15], ROWS[:, :15].nbytes
    with (
        served(runtime_dir, drive_settings("one", runtime_dir / "pool")) as service,
        RawClient(runtime_dir) as client,
    ):
        used = service.run(lambda: service.service.drives[0].catalogue._used)
        context = client.open_named(SHAPE, durable_name="aside").context_id
        apply(service, **{name: aside - 1})
        refused(partial(client.append, context, 0, 0, tail, tail=True), name)
        apply(service, **{name: aside})
        client.append(context, 0, 0, tail[:, :3], tail=True)
        client.append(context, 0, 0, tail, tail=True)
        assert used[ME] == aside
        # What is kept aside goes when the tokens come.
        apply(service, **{name: extent_bytes(SHAPE, next_tokens(0))})
        client.append(context, 0, 0, ROWS)
        assert used[ME] == client.status().pool.used_bytes
        apply(service)
        client.append(context, 0, 64, tail, tail=True)
        client.close_context(context)
        client.delete("aside")
        assert used[ME] == 0


@pytest.mark.parametrize("name", ["session_request_limit", "user_request_limit"])
def test_requests_in_flight_are_bounded_and_the_bound_can_be_changed(runtime_dir: Path, name: str) -> None:
    with (
        served(runtime_dir, drive_settings("one", runtime_dir / "pool")) as service,
        RawClient(runtime_dir) as client,
        ThreadPoolExecutor() as threads,
    ):
        context = client.open(SHAPE)
        client.append(context, 0, 0, ROWS)
        session = service.run(lambda: next(iter(service.service.sessions)))
        request = pb.FetchRequest(
            context_id=context,
            layer=0,
            range=pb.TokenRange(first_token=0, count=64),
            rows=client.region(0, ROWS.nbytes),
        )

        def fetch() -> int:
            return client.call("Fetch", request).read_bytes

        apply(service, **{name: 2})
        with held(service):
            calls = [threads.submit(fetch) for _ in range(2)]
            wait_for(lambda: session.requests == 2, 60)
            refused(fetch, f"2 requests of this .* raise {name}")
            apply(service, **{name: 3})
            calls.append(threads.submit(fetch))
            wait_for(lambda: session.requests == 3, 60)
        assert [call.result(20) for call in calls] == [ROWS.nbytes] * 3
        wait_for(lambda: session.requests == 0, 60)


@contextmanager
def held(service: Served) -> Iterator[None]:
    """Keep the drive busy."""
    gate = service.run(asyncio.Event)

    async def hold() -> None:
        await gate.wait()

    async def submit() -> None:
        await service.service.drives[0].queue.submit_urgent(hold)

    holding = asyncio.run_coroutine_threadsafe(submit(), service.loop)
    try:
        yield
    finally:
        service.loop.call_soon_threadsafe(gate.set)
        holding.result(20)


def test_weights_are_given_at_attach_and_changed_for_sessions_that_are_there(runtime_dir: Path) -> None:
    with served(runtime_dir, drive_settings("one", runtime_dir / "pool")) as service:
        apply(service, user_weights={ME: 3.0})
        with RawClient(runtime_dir):
            (session,) = service.run(lambda: list(service.service.sessions))
            assert session.weight == 3
            apply(service)
            assert session.weight == 1


def test_an_observer_hears_of_every_operation_with_its_session(runtime_dir: Path) -> None:
    with served(runtime_dir, drive_settings("one", runtime_dir / "pool")) as service:
        told: list[tuple[str, Piece]] = []
        service.run(lambda: service.service.observe(lambda drive, piece, _: told.append((drive.name, piece))))
        with RawClient(runtime_dir) as client:
            (session,) = service.run(lambda: list(service.service.sessions))
            context = client.open(SHAPE)
            client.append(context, 0, 0, ROWS)
            client.evaluate(context, SHAPE, 0, np.ones((2, 64), np.float32), 4, 0, 64)
            client.fetch_range(context, SHAPE, 0, 0, 64)
            client.close_context(context)
        wait_for(lambda: any(piece.operation == "detach" for _, piece in told), 60)
    assert [(name, piece.operation, piece.priority) for name, piece in told if piece.flow is session] == [
        ("one", "open", Priority.decode),
        ("one", "append", Priority.bulk),
        ("one", "evaluate", Priority.decode),
        ("one", "fetch", Priority.decode),
        ("one", "close", Priority.bulk),
    ]
    assert all(piece.service_s > 0 and piece.error is None for _, piece in told)
