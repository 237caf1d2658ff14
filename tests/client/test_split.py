"""Ranking split between CPU and drive: the same winners and rows as in one place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_rows import random_kv, random_query

from hillinfer import DType, EvaluateItem, Precision, Session, Shape
from hillinfer.split.boundary import BLOCK_TOKENS, Stop, choose
from hillinfer.split.estimates import Estimate
from hillinfer.split.ranking import SplitRanking

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
            policy.share = data.draw(st.floats(0, 1))
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


class Side:
    def __init__(self, overhead_s: float, rate: float, seed: int) -> None:
        self.overhead_s, self.rate, self.noise = overhead_s, rate, np.random.default_rng(seed)

    def seconds(self, nbytes: int) -> float:
        late = 6.0 if self.noise.random() < 0.03 else 1.0
        return (self.overhead_s + nbytes / self.rate) * (1 + 0.02 * self.noise.random()) * late

    def exact(self, nbytes: int) -> float:
        return self.overhead_s + nbytes / self.rate


@pytest.mark.parametrize("slowed", ["cpu", "drive"])
@pytest.mark.parametrize("rates", [(8e9, 15e9), (20e9, 3e9), (5e9, 5e9)])
def test_the_sides_finish_together_and_again_after_one_is_slowed_threefold(
    slowed: str, rates: tuple[float, float]
) -> None:
    tokens, per_token = 131_072, 512
    sides = {"cpu": Side(5e-5, rates[0], 1), "drive": Side(3e-4, rates[1], 2)}
    estimates = {"cpu": Estimate(), "drive": Estimate()}
    share = BLOCK_TOKENS

    def imbalance() -> float:
        times = sides["cpu"].exact(share * per_token), sides["drive"].exact((tokens - share) * per_token)
        return abs(times[0] - times[1]) / max(times)

    def step() -> None:
        nonlocal share
        for name, held in (("cpu", share), ("drive", tokens - share)):
            estimates[name].observe(held * per_token, sides[name].seconds(held * per_token))
        share = choose(
            tokens, share, tokens, per_token, estimates["cpu"], estimates["drive"], 0.0, -1.0
        ).cpu_tokens

    def settled(steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            step()
            found.append(imbalance())
        return found

    settled(20)
    assert max(settled(20)) <= 0.15
    sides[slowed].rate /= 3
    sides[slowed].overhead_s *= 3
    settled(20)
    assert max(settled(20)) <= 0.15


def test_a_boundary_says_why_it_is_where_it_is() -> None:
    fast, slow = Estimate(0, 1e-10, 5), Estimate(0, 1e-7, 5)
    assert choose(10_000, 0, 10_000, 512, slow, fast, 0).stop is Stop.no_gain
    assert choose(10_000, 0, 10_000, 512, fast, fast, 1.0).stop is Stop.no_gain
    assert choose(10_000, 0, 1024, 512, fast, fast, 0).stop is Stop.memory
    assert choose(10_000, 0, 0, 512, fast, fast, 0).stop is Stop.memory
    assert choose(8192, 0, 8192, 512, fast, fast, 0) == choose(8192, 4096, 8192, 512, fast, fast, 0)
