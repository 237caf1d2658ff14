"""Decode steps: closed forms, monotone in every rate, and decided by the client's own policies."""

import pytest

from hillinfer.pipeline.choice import SAFE_TOKENS, Predictor
from hillinfer.simulate.machine import CONSTANTS, Machine
from hillinfer.simulate.selections import miss_rate
from hillinfer.simulate.step import DRIVE, RESOURCES, build, simulate
from hillinfer.simulate.systems import Layer, System, layer
from hillinfer.simulate.workload import LLAMA_13B, QWEN_7B, SHAPE_8B, Work
from hillinfer.split.boundary import BLOCK_TOKENS

PAPER = Work(QWEN_7B, 8, 12_288, 0.2, 0.3)
OURS = Work(SHAPE_8B, 1, 131_072, 0.02, 0.05)
RATES = [
    "gpu_bandwidth",
    "gpu_link",
    "host_scan",
    "ssd_read",
    "ssd_iops",
    "drive_read",
    "drive_iops",
    "p2p_read",
    "fpga_memory",
    "kernel_clock",
]


def test_every_constant_has_a_source_and_its_range_holds_the_nominal():
    for each in CONSTANTS:
        assert each.source
        if each.worst is not None:
            low, high = sorted((each.worst, each.best))
            assert low <= each.nominal <= high, each.name


def test_with_the_exact_query_a_step_is_the_sum_of_its_layers():
    one = Layer(1, 2, weights=0, upload=3, scan_drive=4, scan_card=5, fetch=6, delay=7, place=9)
    simulation, _ = build(one, 10, Predictor.exact)
    assert simulation.run() == pytest.approx(10 * (1 + 7 + 5 + 6 + 3 + 9 + 2))


def test_a_predicted_query_hides_what_is_shorter_than_a_layer():
    one = Layer(project=1, attend=9, weights=0, upload=1, scan_card=3, fetch=2)
    simulation, _ = build(one, 10, Predictor.next_layer)
    # But for the first layer, whose own ranking waits behind the second's, asked for at the same moment.
    assert simulation.run() == pytest.approx(3 + 3 + 2 + 1 + 9 + 9 * (1 + 9))


def test_reloading_takes_as_long_as_its_bytes():
    machine = Machine()
    read = 0.7 * 2 * 128 * 2 * 32 * 32 * 8 * 12_288 / machine.ssd_read
    step = simulate(System.reload, PAPER, machine)
    one = layer(System.reload, PAPER, machine)
    assert read == pytest.approx(step.busy[DRIVE])
    assert read < step.seconds < read + 2 * (one.upload + one.attend + one.project)


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("system", System)
def test_nothing_becomes_slower_by_a_faster_part(name, system):
    work = OURS if name in ("gpu_bandwidth", "kernel_clock", "drive_read") else PAPER
    nominal = getattr(Machine(), name)
    times = [simulate(system, work, Machine(**{name: nominal * by})).seconds for by in (0.5, 2)]
    assert times[0] >= times[1] * 0.9999


def test_no_resource_works_longer_than_the_step():
    for system in System:
        step = simulate(system, PAPER, Machine(), applications=2)
        assert set(step.busy) == set(RESOURCES)
        assert max(step.busy.values()) <= step.seconds


def test_misses_are_those_of_the_pools():
    nothing_hot = miss_rate(0.2, 0.2, 0.8)
    assert nothing_hot == pytest.approx(0.2, abs=0.01)  # slots alone hold what the step before had
    assert miss_rate(0.2, 0.4, 0.8) < miss_rate(0.2, 0.3, 0.8) < nothing_hot
    assert miss_rate(0.2, 1.0, 0.8) < 0.03  # those that were never selected before
    assert miss_rate(0.2, 0.3, 0.8) == miss_rate.__wrapped__(0.2, 0.3, 0.8)


def test_the_boundary_balances_where_memory_allows():
    step = simulate(System.hillinfer, PAPER, Machine())
    one = layer(System.hillinfer, PAPER, Machine())
    assert 0 < step.cpu_share < 1
    free = layer(System.hillinfer, Work(QWEN_7B, 8, 12_288, 0.2, 0.45), Machine(host_memory=1e12))
    drive = free.delay + max(free.scan_drive, free.scan_card)
    assert abs(free.scan_cpu - drive) / max(free.scan_cpu, drive) < 0.15
    assert free.cpu_share > one.cpu_share
    assert free.cpu_share * 12_288 % BLOCK_TOKENS == 0


def test_the_query_is_chosen_by_the_client_own_rules():
    assert simulate(System.hillinfer, OURS, Machine()).predictor is Predictor.next_layer
    few = Work(SHAPE_8B, 1, 4096, (SAFE_TOKENS - 20) / 4096, 0.05)
    assert simulate(System.hillinfer, few, Machine()).predictor is Predictor.exact
    assert simulate(System.hillinfer, OURS, Machine(prediction_loss=0.5)).predictor is Predictor.exact


def test_weights_that_do_not_fit_the_gpu_cross_the_link():
    assert layer(System.hillinfer, PAPER, Machine()).weights == 0
    streamed = layer(System.hillinfer, Work(LLAMA_13B, 8, 4096, 0.2, 0.3), Machine()).weights
    assert streamed * 40 * Machine().gpu_link == pytest.approx(2 * 13.02e9 - 22 * 2**30)


def test_an_unknown_constant_is_refused():
    with pytest.raises(KeyError, match="no such constant"):
        Machine(warp=9)
