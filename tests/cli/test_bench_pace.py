"""`hillinfer bench decode --pace-compute`: layers take a GPU's time, and those that take longer count."""

import json
import sys

import numpy as np
import pytest
import torch

from hillinfer.bench.decode.pace import Gpu, Pace
from hillinfer.bench.decode.stand_in import PREDICTED_COSINE, STEP_COSINE, paced, parameters, turned
from hillinfer.bench.decode.subject import of_shape
from hillinfer.cli import main
from hillinfer.simulate.machine import GPUS, Machine, machine_with
from hillinfer.simulate.workload import SHAPE_8B
from hillinfer_core.errors import InvalidInput

GPU = Gpu("rtx4090", SHAPE_8B, 1)
RATE = 1008e9 * 0.7  # bytes/s that the simulator has for it


class Clock:
    """Goes on by what is slept, by `work`, and a little whenever it is looked at."""

    def __init__(self):
        self.time = 100.0
        self.slept = 0.0

    def now(self):
        self.time += 1e-7
        return self.time

    def sleep(self, seconds):
        self.slept += seconds
        self.time += seconds + 5e-6  # as late as a sleep is

    def work(self, seconds):
        self.time += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pace(clock):
    return Pace(GPU, clock.now, clock.sleep)


def a_layer(pace, clock, first_s=0.0, second_s=0.0, tokens=655):
    began = clock.time
    pace.begin()
    clock.work(first_s)
    pace.projected()
    placing = 3e-3
    clock.work(placing)  # which is no compute
    attention = clock.time
    clock.work(second_s)
    pace.attended(attention, tokens)
    return clock.time - began - placing


def test_a_layer_takes_as_long_as_its_weights_and_kv_take_to_be_read(pace, clock):
    weights = 2 * SHAPE_8B.parameters / SHAPE_8B.layers
    for tokens in (655, 32_768):
        expected = (weights + tokens * 8 * 2 * 128 * 2) / RATE
        took = a_layer(pace, clock, tokens=tokens)
        assert expected <= took <= expected + 20e-6
    assert (pace.layers, pace.late) == (2, 0)
    assert pace.took_s >= pace.wanted_s
    assert clock.slept > 0


def test_a_layer_whose_work_takes_longer_is_late_and_counted(pace, clock):
    whole = GPU.layer(655).project + GPU.layer(655).attend
    # What the first stretch took too long, the second makes up.
    assert a_layer(pace, clock, first_s=2 * GPU.layer(0).project) == pytest.approx(whole, abs=20e-6)
    assert pace.late == 0
    assert a_layer(pace, clock, second_s=2 * whole) > 2 * whole
    assert a_layer(pace, clock, first_s=whole / 2, second_s=0.6 * whole) > whole
    assert (pace.layers, pace.late) == (3, 2)
    assert pace.took_s > pace.wanted_s + whole


def test_a_query_ahead_takes_its_part_of_the_projections(pace, clock):
    began = clock.time
    pace.begin()
    pace.predicted()
    assert clock.time - began >= GPU.query_s == pytest.approx(GPU.layer(0).project * 32 / 48)
    assert pace.layers == 0


def test_what_must_cross_to_the_gpu_makes_a_layer_longer(pace, clock):
    link_s = GPU.offloaded_s(32_768)
    assert link_s == pytest.approx(32_768 * 8 * 512 / Machine().gpu_link)
    pace.begin()
    pace.projected()
    began = clock.time
    pace.attended(began, 32_768, link_s)
    assert pace.wanted_s == link_s
    assert pace.took_s >= link_s


def test_gpus_differ_and_unknown_ones_are_named(pace):
    assert machine_with("h100").gpu_bandwidth > machine_with("rtx4090").gpu_bandwidth
    assert machine_with("rtx4090").gpu_bandwidth == Machine().gpu_bandwidth
    with pytest.raises(InvalidInput) as raised:
        machine_with("abacus")
    assert all(name in str(raised.value) for name in GPUS)
    GPU.check_room(32_768)
    with pytest.raises(InvalidInput, match=r"rtx4090 has room for 23\.6 GB"):
        GPU.check_room(65_536)
    with pytest.raises(InvalidInput, match="has room for"):
        Gpu("rtx4090", SHAPE_8B, 2).check_room(32_768)


def test_the_stand_in_has_the_weights_of_its_shape_in_time_and_not_in_memory():
    subject = of_shape("8b")
    assert parameters(subject.config) == pytest.approx(SHAPE_8B.parameters, rel=0.001)
    stand_in = paced(subject, "rtx4090", 1)
    assert stand_in.gpu.layer(655).attend == pytest.approx(GPU.layer(655).attend, rel=0.001)
    assert stand_in.kv_shape.numbers == subject.kv_shape.numbers
    model = stand_in.load(torch.bfloat16, "cpu")
    assert sum(each.numel() for each in model.parameters()) < 1000


def test_selections_of_made_up_keys_change_as_the_queries_turn():
    torch.manual_seed(0)
    keys = torch.randn(8192, 128)
    query = torch.randn(16, 128)

    def best(query):
        return [set(each.tolist()) for each in torch.topk(query @ keys.T, 164).indices]

    for cosine, expected in ((STEP_COSINE, 0.69), (PREDICTED_COSINE, 0.94)):
        kept = [len(a & b) / 164 for a, b in zip(best(query), best(turned(query, cosine)), strict=True)]
        assert np.mean(kept) == pytest.approx(expected, abs=0.04)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def command(*options):
        words = ("hillinfer", "bench", "decode", "--shape", "tiny", "--pool-dir", tmp_path, *options)
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capsys.readouterr())

    return command


@pytest.mark.parametrize("predictor", ["auto", "next_layer", "exact"])
def test_every_system_of_a_paced_run_says_how_long_its_compute_was_to_be_and_was(run, predictor):
    options = ("--context-tokens", 8192, "--held", 1, "--rounds", 1, "--steps", 4, "--predictor", predictor)
    code, out, err = run(*options, "--pace-compute", "rtx4090", "--profile", "smartssd", "--json")
    assert code == 0, err
    rows = {row["system"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["hillinfer", "default", "offloaded", "attended only"]
    assert {row["dtype"] for row in rows.values()} == {"bfloat16"}
    for row in rows.values():
        pace = row["pace"]
        assert pace["took_ms"] >= pace["wanted_ms"] >= 0
        assert 0 <= pace["late_share"] <= 1
        assert row["kv"] == "made up"
        # A step holds its compute and whatever else is done for it.
        assert 1e3 / row["tokens_per_s"]["median"] >= pace["took_ms"]
    assert rows["offloaded"]["pace"]["wanted_ms"] > rows["default"]["pace"]["wanted_ms"]
    mine = rows["hillinfer"]
    assert 0 < mine["miss_rate"] < 0.5
    assert mine["evaluated_bytes_per_step"] == pytest.approx(8192 * 2 * 2 * 16, rel=0.05)
    tokens = 8192 + 8 + 4 + 16
    numbers = 2 * 2 * 2 * 32 * 2
    assert rows["default"]["full_bytes"] == tokens * numbers
    assert 0 < rows["default"]["full_bytes"] - rows["default"]["resident_bytes"] <= 24 * numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pace-compute", "abacus"), "no such GPU: abacus; there are rtx4090, h100"),
        (("--pace-compute", "h100", "--readings", 1), "leave out --readings"),
        (("--pace-compute", "h100", "--dtype", "float32"), "leave out --dtype"),
        (
            ("--pace-compute", "rtx4090", "--shape", "8b", "--batch", 3, "--systems", "default"),
            "leave out default",
        ),
    ],
)
def test_what_a_pace_cannot_be_is_one_line(run, options, message):
    code, out, err = run("--context-tokens", 32768, *options)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
