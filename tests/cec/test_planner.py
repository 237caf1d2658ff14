from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hillinfer_core.errors import HillInferError, InvalidInput, UnreadableModel, UnsupportedModel
from hillinfer_core.layout import DType, Precision, Reduction, Shape
from hillinfer_core.units import parse_budget
from hillinferd.cec.cards import SMARTSSD
from hillinferd.cec.command import to_plain
from hillinferd.cec.configurations import SHIPPED
from hillinferd.cec.model import Model, read_model
from hillinferd.cec.planner import Plan, Request, plan
from hillinferd.cec.resources import uram_of_head

LARGE = Model("large", Shape(32, 8, 128, DType.float16), 32, tuple(range(32)), 131_072)
BUNDLED = Path(__file__).parents[2] / "client" / "hillinfer" / "models" / "needle-8m"


def request(**changes: Any) -> Request:
    return replace(Request(LARGE, 131_072, SMARTSSD, parse_budget("2%")), **changes)


def check(made: Plan) -> None:
    """What every plan must satisfy."""
    row = (
        made.request.model.shape.kv_heads * 16 * made.request.model.shape.head_dim * made.precision.bits // 8
    )
    assert sum(layer.dram_bytes for layer in made.layers) <= made.dram_usable_bytes
    for layer in made.layers:
        assert layer.dram_bytes + layer.nand_bytes == layer.key_bytes
        assert layer.dram_bytes % row == 0
        assert layer.time_s == max(layer.seconds.values()) == layer.seconds[layer.bottleneck] > 0
    assert made.token_s == pytest.approx(sum(layer.time_s for layer in made.layers))
    assert made.kernel in SHIPPED
    assert (made.kernel.precision, made.kernel.lanes) == (made.precision, made.lanes)
    assert made.kernel.heads_in_flight == made.heads_in_flight
    json.dumps(to_plain(made))


def test_int4_keys_of_a_large_model_live_in_fpga_dram() -> None:
    made = plan(request())
    check(made)
    assert made.kernel.name == "evaluate_int4"
    # 131,072 tokens of 8 heads of 128 half bytes.
    assert {layer.key_bytes for layer in made.layers} == {67_108_864}
    assert all(layer.nand_bytes == 0 for layer in made.layers)
    assert {layer.bottleneck for layer in made.layers} == {"DRAM"}
    assert made.layers[0].time_s == pytest.approx(67_108_864 / 15.4e9, rel=0.01)


def test_int8_keys_of_a_large_model_overflow_to_nand_evenly() -> None:
    made = plan(request(precision=Precision.int8))
    check(made)
    shares = [layer.dram_bytes for layer in made.layers]
    assert max(shares) - min(shares) <= 8 * 16 * 128
    assert made.dram_usable_bytes - sum(shares) < 8 * 16 * 128
    assert all(layer.nand_bytes > 0 for layer in made.layers)


def test_a_long_context_waits_for_nand() -> None:
    made = plan(request(context=1 << 20, precision=Precision.int8))
    check(made)
    assert made.bottleneck == "NAND"
    assert made.runs == 8


def test_the_maximum_waits_for_the_kernel() -> None:
    made = plan(request(reduction=Reduction.max, precision=Precision.int4))
    check(made)
    assert made.bottleneck == "compute"
    # 4 query heads, 64 bytes a cycle at 300 MHz.
    assert made.layers[0].time_s == pytest.approx(4 * 67_108_864 / 64 / 300e6)
    assert any("--reduction sum" in reason for reason in made.reasons)
    assert not any("add nothing" in reason for reason in made.reasons)


def test_many_results_wait_for_the_link() -> None:
    small = Model("small", Shape(1, 1, 8, DType.float16), 1, (0,), None)
    made = plan(Request(small, 131_072, SMARTSSD, parse_budget("100%")))
    check(made)
    assert made.bottleneck == "link"
    # INT4 would be no faster.
    assert made.precision is Precision.int8


def test_the_planner_says_that_ddr_is_saturated() -> None:
    made = plan(request())
    assert made.ddr_saturated
    assert any("already saturated" in reason and "add nothing" in reason for reason in made.reasons)
    with pytest.raises(InvalidInput, match=r"38\.4 GB/s.*15\.4 GB/s.*nearest that fits is --lanes 128"):
        plan(request(precision=Precision.int4, lanes=256))


def test_lanes_may_choose_the_precision() -> None:
    assert plan(request(lanes=64)).precision is Precision.int8
    assert plan(request(lanes=128)).precision is Precision.int4


def test_guarantee_mode_takes_the_int16_query() -> None:
    made = plan(request(guarantee=True))
    check(made)
    assert made.kernel.name == "evaluate_int8_q16"
    with pytest.raises(InvalidInput, match="use --precision int8"):
        plan(request(guarantee=True, precision=Precision.int4))


def test_resources_are_those_of_the_arithmetic() -> None:
    int8, int4 = plan(request(precision=Precision.int8)), plan(request(precision=Precision.int4))
    assert (int8.resources.dsp, int8.resources.lut, int8.resources.ff) == (64, 1859, 2468)
    assert (int4.resources.dsp, int4.resources.lut, int4.resources.ff) == (0, 9571, 3797)
    assert int8.resources.uram == int4.resources.uram == 32
    assert uram_of_head(65_536) == 8


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        ({"heads_in_flight": 8}, "--heads-in-flight 2"),
        ({"heads_in_flight": 0}, "--heads-in-flight 2"),
        ({"lanes": 0, "precision": Precision.int8}, "--lanes 64"),
        ({"lanes": 32}, "less than DDR gives.*--lanes 128"),
        ({"context": 0}, "is 1$"),
        ({"context": 1 << 40}, "is 1073741824$"),
        ({"reduction": Reduction.max, "model": replace(LARGE, query_heads=128)}, "--reduction sum"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest(changes: dict[str, Any], nearest: str) -> None:
    with pytest.raises(InvalidInput, match=nearest):
        plan(request(**changes))


def test_the_nearest_context_does_fit() -> None:
    with pytest.raises(InvalidInput, match="nearest that fits is --context") as caught:
        plan(request(context=100_000_000))
    nearest = int(str(caught.value).rsplit(" ", 1)[1])
    check(plan(request(context=nearest)))
    with pytest.raises(InvalidInput):
        plan(request(context=nearest + 16))


@given(
    layers=st.integers(1, 80),
    kv_heads=st.integers(1, 32),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    group=st.integers(1, 8),
    context=st.integers(1, 2_000_000),
    precision=st.sampled_from([None, *Precision]),
    reduction=st.sampled_from(Reduction),
)
@settings(max_examples=200, deadline=None)
def test_every_plan_adds_up(
    layers: int,
    kv_heads: int,
    head_dim: int,
    group: int,
    context: int,
    precision: Precision | None,
    reduction: Reduction,
) -> None:
    shape = Shape(layers, kv_heads, head_dim, DType.bfloat16)
    model = Model("any", shape, kv_heads * group, tuple(range(layers)), None)
    wanted = request(model=model, context=context, precision=precision, reduction=reduction)
    try:
        made = plan(wanted)
    except InvalidInput as error:
        fault = str(error)
    else:
        check(made)
        return
    assert "nearest that fits is --context" in fault


def model_directory(path: Path, **changes: Any) -> Path:
    config = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 512, **changes}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_the_bundled_model_is_read() -> None:
    model = read_model(BUNDLED)
    assert model.shape == Shape(8, 2, 64, DType.bfloat16)
    assert (model.query_heads, model.group, model.positions) == (8, 4, 65_536)


def test_what_a_configuration_leaves_out_has_defaults(tmp_path: Path) -> None:
    model = read_model(model_directory(tmp_path))
    assert model.shape == Shape(4, 8, 64, DType.float32)
    assert model.evaluated == (0, 1, 2, 3)


def test_text_part_and_window_layers(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    text = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 512, "layer_types": kinds}
    model = read_model(model_directory(tmp_path, text_config=text))
    assert model.evaluated == (1, 3)
    made = plan(request(model=model))
    check(made)
    assert [layer.layer for layer in made.layers] == [1, 3]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "positive whole number, not -1"),
        ({"num_hidden_layers": True}, "not True"),
        ({"num_hidden_layers": 10**30}, "positive whole number"),
        ({"num_attention_heads": "8"}, "not '8'"),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"head_dim": 512}, "head_dim must be a multiple of 8 from 8 to 256"),
        ({"hidden_size": 4}, "head_dim"),
        ({"dtype": "float8"}, "float16, bfloat16, float32"),
        ({"dtype": ["float16"]}, "dtype"),
        ({"kv_lora_rank": 512}, "latent"),
        ({"layer_types": ["full_attention"]}, "each of the 4 layers"),
        ({"layer_types": [["x"]] * 4}, "no layer with full attention"),
    ],
)
def test_models_that_do_not_suit(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        read_model(model_directory(tmp_path, **changes))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b"nul"])
def test_a_configuration_that_is_not_one(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UnreadableModel):
        read_model(tmp_path)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_garbage_configurations_are_typed_errors(
    tmp_path_factory: pytest.TempPathFactory, text: bytes
) -> None:
    directory = tmp_path_factory.getbasetemp() / "garbage"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_bytes(text)
    with pytest.raises(HillInferError):
        read_model(directory)


def ctl(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hillinferd.ctl", "cec", "plan", *words]
    environment = {**os.environ, "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_the_command_prints_json() -> None:
    done = ctl("--model", str(BUNDLED), "--context", "131072", "--card", "smartssd", "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["configuration"] == "evaluate_int4"
    assert made["precision"] == "int4"
    assert (made["lanes"], made["heads_in_flight"]) == (128, 2)
    assert len(made["layers"]) == 8
    assert made["token"]["bottleneck"] == "DRAM"
    assert made["resources"]["basis"] == "yosys estimate of the arithmetic, not of the kernel"
    assert "measured on a card" in made["unverified"]


def test_the_command_prints_tables() -> None:
    done = ctl("--model", str(BUNDLED), "--context", "131072")
    assert done.returncode == 0, done.stderr
    for part in ("evaluate_int4", "already saturated", "set by DRAM", "0-7", "yosys estimate", "URAM"):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--card", "u50"), "smartssd"),
        (("--context", "many"), "--context"),
        (("--context", "-5"), "--context"),
        (("--context", "99999999999"), "the nearest that can"),
        (("--precision", "fp8"), "int8, int4"),
        (("--reduction", "mean"), "sum, max"),
        (("--budget", "0%"), "budget"),
        (("--lanes", "many"), "--lanes"),
        (("--heads-in-flight", "9"), "--heads-in-flight 2"),
        (("--model", "/nowhere"), "/nowhere is not a directory"),
    ],
)
def test_the_command_refuses_in_one_line(words: tuple[str, ...], says: str) -> None:
    done = ctl("--model", str(BUNDLED), "--context", "131072", *words)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("hillinferctl: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
