"""`hillinfer bench`: what it measures is right, whatever the times are."""

import json
import math
import os
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from hillinfer.bench import kernel as bench
from hillinfer.bench import peers, sharing, split, split_rig
from hillinfer.bench.coarse import screened
from hillinfer.bench.recall import as_markdown, measure, untrained_qwen3
from hillinfer.cli import main
from hillinfer.commands import app
from hillinfer.demo import make_demo
from hillinfer.model_directory import ModelDirectory, bundled_model
from hillinfer.progress import silent
from hillinfer_core import kernel, reference
from hillinfer_core.errors import InvalidInput, UnreadableModel
from hillinfer_core.layout import DType, Precision, Shape, tile_bytes
from hillinfer_core.units import parse_budget

SMALL = (bench.Shape("small", 4096, 2, 64), bench.Shape("smaller", 512, 1, 80))


def test_the_kernel_bench_gives_every_figure():
    result = bench.bench_kernel(3, silent, SMALL)
    json.dumps(result)
    assert set(result["peers"]) == {"numpy", "torch", "numba"}
    for keys in ("int8", "int4"):
        assert result[keys]["fraction_of_stream"] > 0
        assert result[keys]["bytes"] == 4096 * 2 * 64 * (1 if keys == "int8" else 0.5)
        for name in result["peers"]:
            assert result["peers"][name][keys]["ms"] > 0
    assert math.isfinite(result["topk_overhead"])
    assert [shape["tokens"] for shape in result["shapes"]] == [4096, 512]
    assert [shape["k"] for shape in result["shapes"]] == [81, 10]


def test_the_shapes_are_three_or_more_and_the_bundled_model_is_among_them():
    assert len(bench.SHAPES) >= 3
    assert (bench.SHAPES[0].tokens, bench.SHAPES[0].kv_heads, bench.SHAPES[0].head_dim) == (131_072, 8, 128)
    config = ModelDirectory(bundled_model()).config
    assert (config.num_key_value_heads, config.head_dim) in {(s.kv_heads, s.head_dim) for s in bench.SHAPES}


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("precision", Precision)
def test_each_peer_finds_what_the_kernel_finds(name, precision):
    rng = np.random.default_rng(4)
    keys = rng.integers(0, 256, (3, 300, tile_bytes(96, precision)), np.uint8)
    q = rng.integers(-127, 128, (3, 1, 96)).astype(np.int8)
    peer = peers.PEERS[name](precision)
    assert peer is not None
    rows = peers.rows_of(reference.from_tiles(keys, precision), precision)
    expected = kernel.rank([keys], q, precision, 0, 4800, 70)
    found = peer(rows, q[:, 0], 70)
    bench._verify(name, found, expected)
    wrong = found[0].copy(), np.asarray(found[1]).copy()
    wrong[1][1, 5] += 1
    with pytest.raises(bench.PeerMismatchError, match=name):
        bench._verify(name, wrong, expected)


def test_what_is_not_installed_is_null(monkeypatch):
    for module in ("torch", "numba"):
        monkeypatch.setitem(sys.modules, module, None)
    result = bench.bench_kernel(3, silent, SMALL[1:])
    assert result["peers"]["torch"] is None
    assert result["peers"]["numba"] is None
    assert result["peers"]["numpy"]["int8"]["ms"] > 0


@pytest.fixture(scope="module")
def text():
    tokenizer = ModelDirectory(bundled_model()).tokenizer
    demo = make_demo(tokenizer, 700)
    return tokenizer(f"{demo.context}\n{demo.questions[0]}")["input_ids"]


def test_recall_of_the_bundled_model(text):
    directory = ModelDirectory(bundled_model())
    layers = measure(directory.load(directory.dtype), text, parse_budget("5%"), silent)
    assert list(layers) == [str(number) for number in range(8)]
    for choices in layers.values():
        found = {(choice.keys, choice.reduction): choice for choice in choices}
        assert len(found) == 6
        own = found["own", "sum"]
        assert own.recall is None
        # INT8 hardly differs from the model's own keys, and INT4 loses more tokens than mass.
        assert found["int8", "sum"].recall > 0.95
        assert abs(found["int8", "sum"].mass - own.mass) < 0.02
        assert found["int8", "sum"].recall > found["int4", "sum"].recall > 0.7
        assert all(0 < choice.mass <= 1 for choice in choices)
    table = as_markdown("needle", layers)
    assert table.count("\n") == 12
    assert "| mean |" in table


def test_recall_of_everything_is_everything(text):
    layers = measure(untrained_qwen3(2048), text[:100], parse_budget("100%"), silent)
    for choices in layers.values():
        assert all(choice.recall in (None, 1.0) for choice in choices)
        assert all(choice.mass == pytest.approx(1) for choice in choices)


def test_recall_after_a_coarse_pass(text):
    directory = ModelDirectory(bundled_model())
    layers = measure(directory.load(directory.dtype), text, parse_budget("5%"), silent, coarse=True)
    for choices in layers.values():
        own, *coarse = choices
        assert own.recall is None
        assert [choice.keys for choice in coarse] == [
            f"{way} 1/{n}" for way in ("bounds", "spread") for n in (2, 4, 8)
        ]
        # Fewer tiles, fewer of the tokens that a ranking of all chooses.
        for half, quarter, eighth in (coarse[:3], coarse[3:]):
            assert 1 >= half.recall >= quarter.recall >= eighth.recall > 0
            assert half.mass <= own.mass + 0.02
    assert np.mean([choices[4].recall for choices in layers.values()]) > 0.9


def test_a_coarse_pass_keeps_the_tile_with_the_best_key():
    # Bounds never miss it where all channels but one are nought; the last tile is short.
    keys = np.zeros((1, 100, 4), np.float32)
    keys[0, 97, 2] = 5
    queries = np.array([[[0, 0, 1, 0], [0, 0, -1, 0]]], np.float32)
    kept = {(way, part): tokens for way, part, tokens in screened(keys, queries)}
    for part in (2, 4, 8):
        assert kept["bounds", part][0, 0, 96:].all()
        assert not kept["bounds", part][0, 1, 97]
        assert kept["bounds", part].sum() <= 2 * (-(-7 // part)) * 16


def test_recall_of_a_short_text_is_refused(text):
    with pytest.raises(InvalidInput, match="33 or more"):
        measure(untrained_qwen3(2048), text[:32], parse_budget("2%"), silent)


def test_the_commands(tmp_path):
    done = CliRunner().invoke(app, ["bench", "recall", "--context-tokens", "200", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["tokens"] >= 200
    assert len(result["needle-8m"]["layers"]) == 8
    refused = CliRunner().invoke(app, ["bench", "recall", "--model", str(tmp_path / "none")])
    assert isinstance(refused.exception, UnreadableModel)
    shown = CliRunner().invoke(app, ["bench", "--help"]).output
    assert "kernel" in shown
    assert "recall" in shown


def test_the_kernel_command_prints_json_and_tables(monkeypatch):
    measured = bench.bench_kernel(3, silent, SMALL)
    monkeypatch.setattr(bench, "bench_kernel", lambda repeats, progress: measured)
    done = CliRunner().invoke(app, ["bench", "kernel", "--json"])
    assert json.loads(done.stdout) == json.loads(json.dumps(measured))
    table = CliRunner().invoke(app, ["bench", "kernel"]).output
    assert "4,096 x 2 x 64" in table
    assert "the same job" in table


def test_the_sharing_bench_gives_every_figure(tmp_path):
    command = ["bench", "sharing", "--pool-dir", str(tmp_path), "--tokens", "4096", "--rounds", "1"]
    done = CliRunner().invoke(app, [*command, "--seconds", "0.5", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    for name in ("alone", "together", "throughput_ratio", "p99_ratio", "appended_mb_per_s"):
        assert result[name]["median"] > 0
        assert len(result[name]["rounds"]) == 1
    assert 0 < result["jain"]["median"] <= 1
    assert set(result["shares"]) == ({"1", "2", "4"} if os.getuid() == 0 else set())
    assert not list(tmp_path.iterdir())


def test_the_tables_of_the_sharing_bench():
    found = sharing.Sharing(shares={2: sharing.Figure([0.25, 0.35, 0.3])})
    for name in ("alone", "together", "throughput_ratio", "jain", "p99_ratio", "appended_mb_per_s"):
        getattr(found, name).rounds.append(1.0)
    for name in ("p50_alone_ms", "p99_alone_ms", "p50_beside_append_ms", "p99_beside_append_ms"):
        getattr(found, name).rounds.append(2.0)
    table = sharing.as_markdown(found)
    assert "| share at weight 2 of 7 | 0.3 (0.25 to 0.35) |" in table
    assert "only root" in sharing.as_markdown(sharing.Sharing(**(vars(found) | {"shares": {}})))


def test_the_transports_are_compared(tmp_path):
    asked = ["--calls", "25", "--clients", "2", "--seconds", "0.2", "--pool-dir", str(tmp_path), "--json"]
    told = CliRunner().invoke(app, ["bench", "transport", *asked])
    assert told.exit_code == 0, told.output
    figures = json.loads(told.output)
    assert set(figures) == {"grpc_stream", "ring"}
    for each in figures.values():
        assert 0 < each["p50_us"] <= each["p99_us"]
        assert 0 < each["above_p50_us"] < each["p50_us"]
        assert each["per_s"] > 0


def test_a_directory_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hillinfer", "bench", "transport", "--pool-dir", "/nowhere"])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (1, 1)
    assert err.startswith("hillinfer: No such file or directory: /nowhere/")


def test_the_split_bench_slows_either_side_and_says_how_the_boundary_followed(tmp_path):
    setup = split_rig.Setup("tiny", Shape(2, 2, 64, DType.float16, Precision.int8), 4, 4096)
    before = os.sched_getaffinity(0)
    found = split.measure(setup, tmp_path, "smartssd", 3, 50, [("cpu", 25), ("drive", 25)])
    json.dumps(found)
    assert os.sched_getaffinity(0) == before
    assert all(ms > 0 for ms in found["evaluation_ms"].values())
    assert [run["slowed"] for run in found["runs"]] == ["cpu", "drive"]
    for run in found["runs"]:
        assert len(run["steps"]) == 50
        assert all(step["cpu_ms"] is None for step in run["steps"][:4])  # the drive alone, at first
        assert all(step["cpu_tokens"] > 0 for step in run["steps"][4:]), "both are made to work"
        assert set(run["after"]) == {"imbalance", "balanced_share"}
    table = split.as_markdown([found])
    assert table.count("| tiny |") == 3


@pytest.mark.parametrize("text", ["gpu@40", "cpu", "cpu@3", "drive@79", "cpu@x"])
def test_a_side_to_slow_needs_a_step_with_room_around_it(text):
    with pytest.raises(InvalidInput, match="cpu@STEP"):
        split.parse_slow(text, 80)
