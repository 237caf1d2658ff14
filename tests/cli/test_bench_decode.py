"""`hillinfer bench decode`: what it counts is right, whatever the times are."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hillinfer.bench.decode.growth_fits import COSTS, exponents, faster, lines
from hillinfer.bench.decode.growth_fits import as_markdown as as_growth
from hillinfer.bench.decode.processes import children, cpu_s
from hillinfer.bench.decode.replay import Replay
from hillinfer.bench.decode.report import Rows, as_markdown, as_object, ratios
from hillinfer.bench.decode.subject import of_shape, twin
from hillinfer.bench.kvpath.recording import Recording
from hillinfer.cli import main
from hillinfer.evaluation import EvaluateItem
from hillinfer.kv_shape import KvShape
from hillinfer_core.errors import InvalidInput

TOKENS = 2048
FULL_ROW = 2 * 2 * 2 * 32 * 4  # K and V, layers, KV heads, dimension, float32


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def command(*options):
        words = [
            "hillinfer",
            "bench",
            "decode",
            "--shape",
            "tiny",
            "--held",
            1,
            "--pool-dir",
            tmp_path,
            *options,
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capsys.readouterr())

    return command


def test_every_system_has_a_row_and_a_kept_run_is_gone_on_with(run, tmp_path):
    kept, trace = tmp_path / "rows.json", tmp_path / "trace.json"
    options = ("--context-tokens", TOKENS, "--rounds", 2, "--steps", 3, "--keep", kept, "--json")
    code, out, err = run(*options, "--batch", "1,2", "--trace", trace, "--readings", 2)
    assert code == 0, err
    rows = json.loads(out)["rows"]
    names = ["hillinfer", "default", "default", "attended only"]
    assert [row["system"] for row in rows] == names * 2
    assert [row["dtype"] for row in rows] == ["float32", "float32", "bfloat16", "float32"] * 2
    for row in rows:
        longest = TOKENS + 8 + 2 * (16 + 3)
        numbers = FULL_ROW if row["dtype"] == "float32" else FULL_ROW // 2
        assert row["full_bytes"] == numbers * longest * row["batch"]
        assert (row["rounds"], row["steps"], row["kv"]) == (2, 6, "read")
        assert (
            row["tokens_per_s"]["least"] <= row["tokens_per_s"]["median"] <= row["tokens_per_s"]["greatest"]
        )
    mine, default = rows[0], rows[1]
    # Less what HillInfer takes more of to warm up.
    assert default["resident_bytes"] == default["full_bytes"] - 6 * FULL_ROW
    assert mine["prefill_s"]["of"] == mine["question_s"]["of"] == default["prefill_s"]["of"] == 2
    assert rows[3]["prefill_s"] is rows[3]["question_s"] is None
    keys = mine["resident"]["evaluation_keys"]
    assert mine["resident_bytes"] - mine["resident_without_keys_bytes"] == keys > TOKENS * 2 * 2 * 16
    assert mine["attended_tokens"] == 42
    # Ranked at 4 bits for a number: all keys, but those of the pinned tokens and of what waits.
    assert mine["evaluated_bytes_per_step"] == pytest.approx(TOKENS * 2 * 2 * 16, rel=0.05)
    assert 0 < mine["miss_rate"] <= 1
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"compute", "evaluate+fetch"} <= {each["name"] for each in events}

    picture = tmp_path / "rates.svg"
    code, out, err = run(
        *options, "--batch", "1", "--readings", 0, "--systems", "hillinfer,default", "--plot", picture
    )
    assert code == 0, err
    assert "<svg" in picture.read_text()
    told = json.loads(out)
    assert len(told["rows"]) == 8 + 3
    assert told == json.loads(kept.read_text())
    filled = told["rows"][8]
    assert (filled["kv"], filled["prefill_s"], filled["question_s"]) == ("made up", None, None)
    assert filled["evaluated_bytes_per_step"] == pytest.approx(TOKENS * 2 * 2 * 16, rel=0.05)


def test_recorded_keys_are_ranked_by_recorded_queries(run, tmp_path):
    rng, file = np.random.default_rng(1), tmp_path / "recorded.npz"
    keys = rng.standard_normal((2, 2, TOKENS, 32), np.float32).astype(np.float16)
    # The same in every step: after the first, nothing that is selected is lacking.
    queries = np.tile(rng.standard_normal((1, 2, 4, 32), np.float32), (5, 1, 1, 1))
    Recording(keys, queries).save(file)
    options = ("--context-tokens", TOKENS, "--rounds", 1, "--steps", 3, "--systems", "hillinfer", "--json")
    code, out, err = run(*options, "--recording", file)
    assert code == 0, err
    mine = json.loads(out)["rows"][0]
    assert (mine["kv"], mine["miss_rate"]) == ("recorded", 0)
    code, out, err = run(*options, "--readings", 0)  # the random weights' own, which wander
    assert code == 0, err
    assert json.loads(out)["rows"][0]["miss_rate"] > 0

    for others, message in (
        (("--context-tokens", 1024, "--recording", file), "has 2048 tokens, not 1024"),
        (("--readings", 1, "--recording", file), "--recording is for"),
        (("--recording", tmp_path / "nowhere" / "new.npz"), "new.npz: No such file"),
    ):
        code, _, err = run(*options, *others)
        assert code == 2
        assert message in err


def test_what_cannot_be_is_said(run, tmp_path):
    for options, message in (
        (("--systems", "magic"), "no such system: magic"),
        (("--plot", "rates.gif"), ".png or .svg"),
        (("--systems", "offloaded"), "needs a GPU"),
        (("--context-tokens", "many"), "numbers of at least 1"),
        (("--model", tmp_path), "--model or --shape"),
        # Before the work, which would take long: even before it is known what to measure.
        (("--trace", tmp_path / "nowhere" / "trace.json", "--systems", "magic"), "trace.json: No such file"),
        (("--keep", tmp_path / "nowhere" / "rows.json", "--systems", "magic"), "rows.json: No such file"),
    ):
        code, _, err = run(*options)
        assert code == 2
        assert message in err
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(InvalidInput, match="no rows of this benchmark"):
        Rows(tmp_path / "other.json")


def test_recorded_queries_move_with_every_step_from_the_first_on():
    tokens, steps = 512, 6
    rng = np.random.default_rng(0)
    recording = Recording(
        rng.standard_normal((4, 2, tokens, 64)).astype(np.float16),
        rng.standard_normal((steps, 4, 8, 64)).astype(np.float32),
    )
    replay = Replay(recording, KvShape(1, 8, 128), 32, tokens)
    contexts = [SimpleNamespace(context_id=number) for number in (1, 2)]
    held = np.empty((8, 0), np.uint32)
    seen = []
    for step in range(steps + 1):
        items = [EvaluateItem(each, np.zeros((32, 128)), 9, 0, tokens - 31 + step, held) for each in contexts]
        one, other = replay.asked(0, items)
        np.testing.assert_array_equal(one.query, other.query)
        seen.append(one.query)
    assert len({each.tobytes() for each in seen[:steps]}) == steps
    np.testing.assert_array_equal(seen[steps], seen[0])


def _row(system, dtype="float32", rate=10.0, prefill=20.0, client=0.0, **also):
    spread = {"median": rate, "least": rate, "greatest": rate, "of": 5}
    return {
        "model": "m", "device": "cpu", "profile": None, "context_tokens": 100, "kv": "read", "batch": 1,
        "system": system, "dtype": dtype, "budget": "2%", "tokens_per_s": spread, "step_p50_ms": 100.0,
        "step_p99_ms": 120.0, "prefill_s": spread | {"median": prefill},
        "question_s": spread | {"median": 0.5},
        "full_bytes": 1000, "resident_bytes": 160, "resident_without_keys_bytes": 100, "miss_rate": None,
        "written_bytes_per_step": 7, "read_bytes_per_step": 9,
        "cpu_ms_per_step": {"client": client, "daemon": 2.0}, "parts_ms": {}, **also,
    }  # fmt: skip


def test_ratios_are_those_to_the_faster_dtype_of_the_same_cell():
    rows = [
        _row("hillinfer", rate=12.0, prefill=22.0, client=60.0, parts_ms={"predict": 3.0, "place": 1.5}),
        _row("default", rate=8.0, prefill=20.0),
        _row("default", "bfloat16", rate=6.0, prefill=40.0),
        _row("default", rate=100.0, batch=2),
        _row("attended only", client=50.0),
        _row("attended only", client=90.0, budget="20%"),
    ]
    (found,) = ratios(rows)
    assert found["rate_of_default"] == 1.5
    assert found["rate_of_offloaded"] is None
    assert found["prefill_of_default"] == 1.1
    assert found["question_of_ttft"] == round(0.5 / 22.5, 4)
    assert (found["resident_share"], found["resident_without_keys_share"]) == (0.16, 0.1)
    assert found["overhead"] == {"client_ms": 10.0, "daemon_ms": 2.0}
    assert found["overhead_share"] == 0.144  # of 1 / 12 s
    assert found["beyond_work_share"] == 0.09
    table = as_markdown(as_object(rows))
    assert "1.50 times the rate of the default cache" in table
    assert table.count("| default 2%, ") == 3


def test_a_twin_shares_the_weights_and_not_the_attention():
    model = of_shape("tiny").load(torch.float32, "cpu")
    other = twin(model)
    ids = of_shape("tiny").text(8)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=0, atol=0)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    other.set_attn_implementation("eager")
    assert model.config._attn_implementation != "eager"


def test_cpu_times_are_those_of_the_process():
    with subprocess.Popen(
        [sys.executable, "-c", "sum(range(20_000_000)); input()"], stdin=subprocess.PIPE
    ) as busy:
        assert busy.pid in children(os.getpid())
        while cpu_s(busy.pid) < 0.05:
            assert busy.poll() is None
        busy.communicate(b"\n")
    assert cpu_s(busy.pid) == 0.0


def test_growth_counts_every_layer_and_application(monkeypatch, capsys, tmp_path):
    kept, picture = tmp_path / "growth.json", tmp_path / "growth.svg"

    def run(*options):
        words = [
            "hillinfer",
            "bench",
            "growth",
            "--pool-dir",
            tmp_path,
            "--rounds",
            2,
            "--steps",
            2,
            *options,
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capsys.readouterr())

    code, _, err = run("--axes", "applications", "--sizes", "1,2", "--keep", kept)
    assert code == 0, err
    code, out, err = run("--axes", "layers", "--sizes", "2,4", "--keep", kept, "--plot", picture)
    assert code == 0, err
    assert "| layers | 2 to 4 |" in out
    assert "| applications | 1 to 2 |" in out
    assert picture.stat().st_size > 1000
    for each in json.loads(kept.read_text())["axes"]:
        small, large = each["points"]
        assert large["evaluated_bytes"] == pytest.approx(2 * small["evaluated_bytes"], rel=0.02)
        assert each["exponents"]["evaluated_bytes"] == pytest.approx(1, abs=0.03)
        assert small["row_reads"] > 0
    for option in ("--keep", "--plot"):
        code, _, err = run("--axes", "wisdom", option, tmp_path / "nowhere" / "growth.svg")
        assert code == 2
        assert "nowhere" in err
    picture.write_text("not what it keeps")
    code, _, err = run("--axes", "layers", "--keep", picture)
    assert code == 2
    assert "no axes of this benchmark" in err
    code, _, err = run("--axes", "tokens", "--sizes", "4")
    assert (code, err.count("Traceback")) == (2, 0), err
    code, _, err = run("--axes", "wisdom")
    assert code == 2
    assert "tokens, 160 attended" in err


def test_exponents_are_those_of_the_powers():
    points = [
        {
            "size": n,
            "step_ms": 3 * n,
            "evaluated_bytes": n**2,
            "read_bytes": 7,
            "row_reads": 0,
            "drive_cpu_ms": n**0.5,
        }
        for n in (1, 2, 4, 8)
    ]
    found = exponents(points)
    assert found == {
        "step_ms": 1.0, "evaluated_bytes": 2.0, "read_bytes": pytest.approx(0), "row_reads": None,
        "drive_cpu_ms": 0.5,
    }  # fmt: skip


def _growth_points(cost):
    return [
        {"size": n, "least_ms": 1, "greatest_ms": 1} | dict.fromkeys(COSTS, cost(n))
        for n in (4096, 8192, 16384, 32768, 65536)
    ]


def test_a_line_that_begins_below_zero_is_told_from_growth_faster_than_linear():
    straight, bent = _growth_points(lambda n: n - 1800), _growth_points(lambda n: n**1.5)
    assert exponents(straight)["read_bytes"] > 1.15
    assert lines(straight)["read_bytes"] == pytest.approx({"fixed": -1800, "each": 1, "off": 0}, abs=1e-6)
    assert lines(bent)["read_bytes"]["off"] > 0.3
    assert faster(straight) == []
    assert faster(bent) == list(COSTS)
    assert faster(_growth_points(lambda n: n**0.5)) == []
    assert lines(bent[:2])["read_bytes"] is None, "two points are always on a line"
    told = as_growth([{"axis": "a", "points": straight}, {"axis": "b", "points": bent}])
    assert "straight line): step_ms against b, evaluated_bytes against b" in told
    assert "against a" not in told
    assert "-3%, 0%" in told
