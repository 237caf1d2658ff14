"""Ranking split between CPU and drive: the same winners and rows as in one place."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_rows import random_kv, random_query

from hillinfer import DType, EvaluateItem, Precision, PrivateDaemon, Session, Shape
from hillinfer.split.boundary import Stop, choose
from hillinfer.split.controller import MOST_EVERY, PROBE_EVERY, Controller, Times
from hillinfer.split.estimates import Estimate
from hillinfer.split.ranking import SplitRanking
from hillinfer.split.trial import SETTLING, TURNS, Taken, Trial, saved_s
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
            controller.saw(times, max(times.cpu_s, times.drive_s), 0)
        else:
            controller.saw_alone(times.drive_s, 0)
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


class Layer:
    """A layer on a simulated clock: how long a ranking takes alone and divided, at rows that come and go."""

    tokens, per_token = 32_768, 512

    def __init__(self, **controller: Any) -> None:
        self.controller = Controller(**controller)
        self.alone_s, self.row_s, self.extra_s, self.cpu_scan_s = 4e-3, 1e-6, 0.0, 4e-3
        self.rng = np.random.default_rng(0)
        self.taken: list[str] = []
        self.seconds: list[float] = []

    def step(self, rows: int = 0) -> None:
        """Rank once."""
        boundary = self.controller.boundary = self.controller.choose(self.tokens, self.tokens, self.per_token)
        share, noise = boundary.cpu_tokens / self.tokens, self.rng.uniform(1.0, 1.02)
        if not share or self.controller.is_due_alone():
            self.taken.append("turn alone" if share else "alone")
            self.seconds.append((self.alone_s + rows * self.row_s) * noise)
            self.controller.saw_alone(self.seconds[-1], rows)
            return
        self.taken.append("probe" if boundary.stop is Stop.probe else "divided")
        cpu_s, drive_s = share * self.cpu_scan_s, (1 - share) * 4e-3
        self.seconds.append((max(cpu_s, drive_s) + self.extra_s + rows * self.row_s) * noise)
        own, other = (round(part * self.tokens * self.per_token) for part in (share, 1 - share))
        self.controller.saw(Times(own, cpu_s, cpu_s, other, drive_s, drive_s), self.seconds[-1], rows)

    def run(self, steps: int, rows: Sequence[int] = (0,)) -> list[str]:
        before = len(self.taken)
        for number in range(steps):
            self.step(rows[number % len(rows)])
        return self.taken[before:]


def test_a_split_that_pays_stays_and_either_way_is_looked_at_again() -> None:
    layer = Layer()
    layer.run(20)
    later = layer.run(10 * PROBE_EVERY)
    assert layer.controller.boundary.cpu_tokens == pytest.approx(layer.tokens / 2, abs=256)
    assert 0 < later.count("turn alone") < PROBE_EVERY
    assert later.count("alone") == 0
    # Both share what they scan with: alone, the drive would be as fast as they are together.
    layer.alone_s = 2e-3
    layer.run(2 * PROBE_EVERY)
    later = layer.run(10 * PROBE_EVERY)
    assert later.count("alone") > 9 * PROBE_EVERY
    assert later.count("divided") > 0
    layer.alone_s = 4e-3
    layer.run(MOST_EVERY + PROBE_EVERY)
    assert layer.run(PROBE_EVERY).count("divided") > PROBE_EVERY / 2


def test_where_dividing_does_not_pay_it_is_tried_less_and_less() -> None:
    layer, of_a_trial = Layer(), SETTLING + TURNS
    layer.extra_s = 3e-3
    layer.run(30)
    assert layer.taken.count("divided") == of_a_trial
    first, later = layer.run(4 * PROBE_EVERY), layer.run(4 * MOST_EVERY)
    assert first.count("divided") == 2 * of_a_trial
    assert 3 * of_a_trial <= later.count("divided") <= 5 * of_a_trial


def test_a_split_whose_second_request_costs_more_than_it_saves_ends_with_its_trial() -> None:
    layer, rng = Layer(), np.random.default_rng(1)
    layer.extra_s = 3e-3
    # As at alpha 20 %: many rows at first, then as the text has it; they take far longer than the ranking.
    rows = [52_144, 19_665, 12_621, 8_221, *rng.integers(2_400, 13_800, 1000).tolist()]
    layer.run(40, rows)
    later = layer.run(4 * PROBE_EVERY, rows[40:])
    assert later.count("divided") + later.count("probe") < 0.05 * len(later)
    # The noise is 1 % in the mean; the looks at the other way cost less than another.
    alone = layer.alone_s + layer.row_s * np.mean(rows[40 : 40 + len(later)])
    assert np.mean(layer.seconds[-len(later) :]) < 1.02 * alone


def test_a_split_must_save_more_to_begin_than_to_stay() -> None:
    for saved, begins, stays in ((0.02, False, False), (0.075, False, True), (0.2, True, True)):
        fresh, dividing = Layer(), Layer()
        dividing.run(40)
        for layer in (fresh, dividing):
            layer.extra_s = layer.alone_s * (1 - saved) - 2e-3
        assert ("divided" in fresh.run(2 * PROBE_EVERY)[40:PROBE_EVERY]) is begins
        dividing.run(2 * PROBE_EVERY)
        assert ("alone" not in dividing.run(PROBE_EVERY)) is stays


def test_a_side_that_became_slower_is_seen_at_the_next_look() -> None:
    layer = Layer()
    layer.alone_s = 2e-3  # both share what they scan with
    layer.cpu_scan_s = 0.1  # nothing is promised
    layer.run(40)
    assert "divided" not in layer.taken
    layer.alone_s, layer.cpu_scan_s = 4e-3, 4e-3
    layer.run(2 * PROBE_EVERY)
    assert layer.taken[-1] == "divided"


def test_a_memory_limit_ends_a_trial_and_it_begins_again() -> None:
    layer = Layer()
    layer.run(10)
    assert layer.taken[-2:] == ["turn alone", "divided"]
    boundary = layer.controller.choose(layer.tokens, 0, layer.per_token)
    assert boundary.stop is Stop.memory
    layer.run(20)
    assert layer.taken[-1] == "divided"


def test_how_a_trial_begins_does_not_count() -> None:
    trial, together = Trial(), itertools.chain([9e-3, 6e-3, 5e-3], itertools.repeat(2e-3))
    while not trial.over:
        if trial.alone_is_next:
            trial.alone.append(Taken(4e-3, 0))
        else:
            trial.together.append(Taken(next(together), 0))
    assert trial.saved() == pytest.approx(0.5)


def test_what_is_saved_is_seen_at_the_same_rows() -> None:
    rng = np.random.default_rng(0)

    def rankings(fixed_s: float, rows: Sequence[int]) -> list[Taken]:
        return [Taken(fixed_s + 1e-6 * each + rng.uniform(0, 1e-4), each) for each in rows]

    few, many = rng.integers(2_000, 6_000, 5), rng.integers(8_000, 13_000, 5)
    assert saved_s(rankings(4e-3, few), rankings(3e-3, many)) == pytest.approx(1e-3, abs=2e-4)
    outlier = [*rankings(4e-3, few)[:4], Taken(0.1, 4_000)]
    assert saved_s(outlier, rankings(3e-3, many)) == pytest.approx(1e-3, abs=3e-4)
    assert saved_s(rankings(4e-3, [0] * 5), rankings(5e-3, [0] * 5)) == pytest.approx(-1e-3, abs=2e-4)


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
