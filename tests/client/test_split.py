"""Ranking split between CPU and drive: the same winners and rows as in one place."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_rows import random_kv, random_query

from hillinfer import DType, EvaluateItem, Precision, PrivateDaemon, Session, Shape
from hillinfer.split.boundary import Stop, choose
from hillinfer.split.controller import PROBE_EVERY, Controller, Times
from hillinfer.split.estimates import Estimate
from hillinfer.split.ranking import SplitRanking
from hillinfer_core.errors import InvalidInput

MIB = 1 << 20


def same(session: Session, policy: SplitRanking, item: EvaluateItem) -> None:
    [expected] = session.evaluate_and_bring(0, [item])
    [found] = policy.select(session, 0, [item])
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert found.missing_per_head == expected.missing_per_head
    np.testing.assert_array_equal(found.rows, expected.rows)
    assert found.generation == expected.generation


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_winners_are_those_of_one_place_at_any_boundary(session: Session, data: st.DataObject) -> None:
    heads = data.draw(st.integers(1, 3))
    dim = data.draw(st.sampled_from([8, 64]))
    shape = Shape(1, heads, dim, DType.float32, data.draw(st.sampled_from(list(Precision))))
    tokens = data.draw(st.integers(3, 8)) * 256
    keys, values = random_kv(shape, tokens, data.draw(st.integers(0, 9)))
    if data.draw(st.booleans()):
        keys = np.sign(keys).astype(np.float32)
        keys[:, 256:] = keys[:, :1]  # ties on both sides
    nothing = np.empty((heads, 0), np.uint32)
    policy = SplitRanking(data.draw(st.floats(0, 1)), 8 * MIB)
    with session.open_context(shape) as context:
        # The first append is small: the ranges are fitted again on reaching 1,024 tokens.
        for start, end in ((0, 512), (512, tokens)):
            context.append(0, keys[:, start:end], values[:, start:end])
            last = data.draw(st.integers(400, end))
            first = data.draw(st.integers(0, 40))
            k = data.draw(st.integers(1, last - first))
            held = (
                nothing
                if data.draw(st.booleans())
                else np.arange(0, 300, 2, np.uint32)[None].repeat(heads, 0)
            )
            item = EvaluateItem(context, random_query(2 * heads, dim, k), k, first, last, held)
            same(session, policy, item)
            policy.controllers[0].share = data.draw(st.floats(0, 1))
            same(session, policy, item)
    policy.close()


def test_another_generation_is_never_merged_with_the_mirrors(session: Session) -> None:
    shape = Shape(1, 2, 64, DType.float16, Precision.int8)
    keys, values = random_kv(shape, 2048)
    policy = SplitRanking(0.5, 8 * MIB)
    nothing = np.empty((2, 0), np.uint32)
    with session.open_context(shape) as context:
        context.append(0, keys[:, :768], values[:, :768])
        item = EvaluateItem(context, random_query(4, 64), 50, 0, 768, nothing)
        same(session, policy, item)
        assert policy.mirrored_bytes > 0
        # The range stays, so nothing new is fetched: the drive's answer alone tells.
        context.append(0, keys[:, 768:], values[:, 768:])
        same(session, policy, item)
        assert policy.mirrored_bytes == 0
        same(session, policy, item)
        assert policy.mirrored_bytes > 0
    policy.close()


@pytest.mark.parametrize("limit", [0, 100_000, MIB])
def test_mirrored_keys_are_held_to_their_limit(session: Session, limit: int) -> None:
    shape = Shape(1, 2, 64, DType.float16, Precision.int8)
    policy = SplitRanking(1.0, limit)
    with session.open_context(shape) as context:
        context.append(0, *random_kv(shape, 4096))
        for end in range(2000, 4000, 333):
            same(
                session,
                policy,
                EvaluateItem(context, random_query(4, 64), 50, 4, end, np.empty((2, 0), np.uint32)),
            )
            assert policy.mirrored_bytes <= limit
    policy.close()


RECORDED = json.loads((Path(__file__).parent / "split_times.json").read_text())
"""Of each ranking of a run of `hillinfer bench split` (8B, INT8; layer after layer): the CPU's scan as a
multiple of the median, what it waited besides in us; and the same of the drive."""


class Clock:
    """Both sides on a simulated clock, with the recorded noise; rates in bytes a second."""

    def __init__(self, cpu: float, drive: float) -> None:
        self.rates = {"cpu": cpu, "drive": drive}
        self._noise = itertools.cycle(RECORDED)

    def times(self, cpu_bytes: int, drive_bytes: int) -> Times:
        cpu, cpu_us, drive, drive_us = next(self._noise)
        cpu_scan, drive_scan = (
            cpu * cpu_bytes / self.rates["cpu"],
            drive * drive_bytes / self.rates["drive"],
        )
        return Times(
            cpu_bytes,
            cpu_scan + cpu_us * 1e-6,
            cpu_scan,
            drive_bytes,
            drive_scan + drive_us * 1e-6,
            drive_scan,
        )

    def exact(self, cpu_bytes: int, drive_bytes: int) -> float:
        """The imbalance without noise."""
        cpu, drive = (
            median(each[column] for each in RECORDED) * 1e-6 + nbytes / self.rates[side]
            for side, column, nbytes in (("cpu", 1, cpu_bytes), ("drive", 3, drive_bytes))
        )
        return abs(cpu - drive) / max(cpu, drive)


@pytest.mark.parametrize("slowed", ["cpu", "drive"])
@pytest.mark.parametrize("rates", [(12e9, 15.4e9), (20e9, 5e9), (5e9, 5e9)])
def test_the_sides_finish_together_and_again_after_one_is_slowed_threefold(
    slowed: str, rates: tuple[float, float]
) -> None:
    tokens, per_token = 131_072, 1024
    clock, controller = Clock(*rates), Controller(least_gain=-1.0)

    def step() -> float:
        cpu = controller.choose(tokens, tokens, per_token)
        controller.boundary = cpu
        own, other = cpu.cpu_tokens * per_token, (tokens - cpu.cpu_tokens) * per_token
        times = clock.times(own, other)
        if own:
            controller.saw(times)
        else:
            controller.saw_alone(other, times.drive_s, times.drive_scan_s)
        if cpu.stop is Stop.all_cpu:
            return 0.0  # and says so
        return clock.exact(own, other)

    def settled(steps: int) -> list[float]:
        return [step() for _ in range(steps)]

    settled(20)
    assert max(settled(60)) <= 0.15
    clock.rates[slowed] /= 3
    assert settled(1)[0] > 0.3
    settled(19)
    assert max(settled(60)) <= 0.15


def rated(s_per_byte: float) -> Estimate:
    estimate = Estimate()
    estimate.observe(1000, 1000 * s_per_byte, 1000 * s_per_byte)
    return estimate


def test_a_boundary_says_why_it_is_where_it_is() -> None:
    fast, slow = rated(1e-10), rated(1e-7)
    alone = fast.seconds(10_000 * 512)
    assert choose(10_000, 0, 10_000, 512, slow, fast, alone, 0).stop is Stop.no_gain
    assert choose(10_000, 0, 10_000, 512, fast, fast, alone, 1.0).stop is Stop.no_gain
    assert choose(10_000, 0, 10_000, 512, fast, fast, alone / 2, 0).stop is Stop.no_gain
    assert choose(10_000, 0, 1024, 512, fast, fast, alone, 0).stop is Stop.memory
    assert choose(10_000, 0, 0, 512, fast, fast, alone, 0).stop is Stop.memory
    even = choose(8192, 0, 8192, 512, fast, fast, alone, 0)
    assert even.stop is Stop.none
    assert even.cpu_tokens == 4096


def test_waiting_in_a_queue_is_not_taken_for_the_rate() -> None:
    estimate = Estimate()
    for step in range(12):
        estimate.observe(1000, 2e-6 + 1e-6 * (step % 5), 1e-6)
    assert estimate.s_per_byte == pytest.approx(1e-9)
    assert estimate.overhead_s == pytest.approx(2e-6)
    assert estimate.seconds(0) == 0
    assert estimate.seconds(4000) == pytest.approx(6e-6)


def test_either_way_of_ranking_is_looked_at_again() -> None:
    """The drive alone while split, and the CPU by a probe while not; a split without gain ends."""
    controller, tokens, per_token = Controller(), 32_768, 512

    def step(cpu_rate: float, alone_rate: float) -> int:
        cpu = controller.choose(tokens, tokens, per_token)
        controller.boundary = cpu
        own, other = cpu.cpu_tokens * per_token, (tokens - cpu.cpu_tokens) * per_token
        if not own or controller.is_due_alone():
            whole = tokens * per_token / alone_rate
            controller.saw_alone(tokens * per_token, whole, whole)
            return -1 if own else 0
        controller.saw(Times(own, own / cpu_rate, own / cpu_rate, other, other / 4e9, other / 4e9))
        return cpu.cpu_tokens

    first = [step(4e9, 4e9) for _ in range(PROBE_EVERY + 2)]
    assert first[0] == 0
    assert first[-1] in (tokens // 2, -1)
    # Both share what they scan with: alone, the drive would be as fast as they are together.
    later = [step(4e9, 8e9) for _ in range(10 * PROBE_EVERY)]
    assert -1 in later
    assert later.count(0) > 5 * PROBE_EVERY
    assert tokens // 8 in later


def test_a_cache_grants_no_more_than_it_is_asked_for(session: Session) -> None:
    shape = Shape(1, 2, 64, DType.float16, Precision.int8)
    policy = SplitRanking(0.5)
    keys, values = random_kv(shape, 4096)
    with session.open_context(shape) as context, session.open_context(shape) as other:
        context.append(0, keys, values)
        other.append(0, keys, values)
        item = EvaluateItem(context, random_query(4, 64), 50, 0, 4096, np.empty((2, 0), np.uint32))
        assert policy.reserve(MIB, [context]) == 0
        same(session, policy, item)
        assert policy.mirrored_bytes == 0
        wanted = policy.reserve(MIB, [context])
        assert 2048 * 128 <= wanted < 4096 * 128
        same(session, policy, item)
        assert 2048 * 128 <= policy.mirrored_bytes <= wanted
        assert policy.held_bytes([other]) == 0
        assert policy.reserve(100_000, [context]) == policy.mirrored_bytes
        same(session, policy, item)
        assert policy.mirrored_bytes <= 100_000
    policy.close()


def test_what_the_drive_refuses_is_refused_and_the_session_goes_on(session: Session) -> None:
    shape = Shape(1, 2, 64, DType.float16, Precision.int8)
    policy = SplitRanking(0.5, 8 * MIB)
    with session.open_context(shape) as context:
        context.append(0, *random_kv(shape, 2048))
        item = EvaluateItem(context, random_query(4, 64), 50, 0, 2048, np.empty((2, 0), np.uint32))
        with pytest.raises(InvalidInput):
            policy.select(session, 0, [item._replace(query=np.full((4, 64), np.nan, np.float32))])
        same(session, policy, item)
    policy.close()


@pytest.mark.parametrize("ring", [True, False])
def test_the_drive_is_asked_before_the_cpu_begins(daemon: PrivateDaemon, ring: bool) -> None:
    """It has answered by the time that the CPU is done, however long that took."""
    shape = Shape(1, 2, 64, DType.float16, Precision.int8)
    with Session.connect(daemon.socket, ring=ring) as session, session.open_context(shape) as context:
        context.append(0, *random_kv(shape, 2048))
        item = EvaluateItem(context, random_query(4, 64), 50, 0, 2048, np.empty((2, 0), np.uint32))
        ended = []

        def meanwhile() -> None:
            time.sleep(1)
            ended.append(time.monotonic())

        [answer] = session.rank(0, [item], meanwhile=meanwhile)
        assert len(ended) == 1
        assert 0 < answer.answered_at < ended[0]
        assert answer.scan_s > 0


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_sequences_of_a_batch_are_split_each_by_itself(session: Session, share: float) -> None:
    shape = Shape(1, 2, 64, DType.float16, Precision.int4)
    policy = SplitRanking(share, 8 * MIB)
    nothing = np.empty((2, 0), np.uint32)
    with session.open_context(shape) as first, session.open_context(shape) as second:
        first.append(0, *random_kv(shape, 2048, 1))
        second.append(0, *random_kv(shape, 1024, 2))
        items = [
            EvaluateItem(first, random_query(4, 64), 50, 0, 2000, nothing),
            EvaluateItem(second, random_query(4, 64), 30, 4, 300, nothing),  # share of it: less than a block
        ]
        expected = session.evaluate_and_bring(0, items)
        for mine, whole in zip(policy.select(session, 0, items), expected, strict=True):
            np.testing.assert_array_equal(mine.ids, whole.ids)
            np.testing.assert_array_equal(mine.rows, whole.rows)
    policy.close()


def test_the_rows_that_the_first_ranking_alone_brings_do_not_make_a_split_worth_it() -> None:
    controller, tokens, per_token = Controller(), 32_768, 512
    whole, seen = tokens * per_token, []
    for number in range(20):
        boundary = controller.boundary = controller.choose(tokens, tokens, per_token)
        seen.append(boundary)
        own = boundary.cpu_tokens * per_token
        if not own:
            # All rows are missing at first, a few later.
            controller.saw_alone(whole, 3e-3 if number else 10e-3, 1e-3)
            continue
        # Working together helps neither: they share what they scan with.
        controller.saw(Times(own, 3e-3, 1e-3, whole - own, 3e-3, 1e-3))
        controller.rows.add(2e-3)
    assert [each.stop for each in seen[-10:]] == [Stop.no_gain] * 10
