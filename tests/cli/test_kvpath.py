"""`hillinfer bench kvpath`: every system brings what it says, from the same drive."""

import json
import sys

import numpy as np
import pytest
import torch

from hillinfer.bench.kvpath.recording import Recording
from hillinfer.bench.kvpath.rig import rig
from hillinfer.bench.kvpath.systems import SYSTEMS
from hillinfer.bench.kvpath.workload import SHAPES, make_workload
from hillinfer.cli import main
from hillinfer.hkm.decode import bring
from hillinfer.hkm.slots import EMPTY
from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import Precision
from hillinfer_core.units import Budget

TOKENS, STEPS = 2048, 28


@pytest.fixture(scope="module")
def recording():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((4, 2, TOKENS, 64)).astype(np.float16)
    return Recording(keys, rng.standard_normal((STEPS, 4, 8, 64)).astype(np.float32))


def test_all_that_rank_evaluation_keys_choose_the_same_and_bring_the_rows(recording, tmp_path):
    workload = make_workload(recording, SHAPES["8b"], seed=1)
    assert (workload.keys.shape, workload.layers, workload.tokens) == ((1, 8, TOKENS, 128), 1, TOKENS)
    chosen = {}
    with rig(workload, "none", Precision.int4, 48 << 20, tmp_path) as ready:
        for name, kind in SYSTEMS.items():
            if name.startswith("reload"):
                continue
            system = kind(ready)
            cache = ready.cache(Budget(alpha=0.1), system, system.hot_pool)
            (layer,) = cache.full_layers
            for step in range(4):
                assert bring(layer, torch.from_numpy(workload.queries[step, 0])[None, :, None], 0.1)
                layer.pools.settle()
            assert bool(layer.hot.capacity) is kind.hot_pool
            ids = layer.slots.ids[0]
            for head in range(8):
                (places,) = np.nonzero(ids[head] != EMPTY)
                tokens = ids[head, places]
                held = layer.slots.keys[0, head, layer.slots.pinned + places].numpy()
                np.testing.assert_array_equal(held, workload.keys[0, head, tokens])
            chosen[name] = np.sort(ids, axis=-1)
            cache.close()
            system.close()
    same = ("hkm_only", "host_ranking", "no_csd", "host_scoring_int4")
    for name in same:
        np.testing.assert_array_equal(chosen[name], chosen["hillinfer"], err_msg=name)
    np.testing.assert_array_equal(chosen["host_scoring_held"], chosen["host_scoring"])
    exact = chosen["host_scoring"]
    query = workload.queries[3, 0].reshape(8, 4, 128).sum(1)
    scores = np.einsum("hnd,hd->hn", workload.keys[0].astype(np.float32), query)[:, 4 : TOKENS - 32]
    best = np.sort(np.argsort(-scores, axis=-1)[:, : exact.shape[1]] + 4, axis=-1)
    assert np.mean(exact == best) > 0.99  # float32 sums in another order may exchange the last
    assert len(chosen) == len(SYSTEMS) - 2


def test_a_recording_that_does_not_fill_the_shape_is_refused(recording):
    odd = Recording(recording.keys[:3], recording.queries[:, :3])
    with pytest.raises(InvalidInput, match="6 recorded KV heads"):
        make_workload(odd, SHAPES["8b"], seed=0)


def test_the_command_prints_a_row_for_each_system(recording, tmp_path, monkeypatch, capsys):
    file = tmp_path / "recording.npz"
    recording.save(file)

    def run(*options):
        words = ["hillinfer", "bench", "kvpath", "--recording", file, "--pool-dir", tmp_path, *options]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capsys.readouterr())

    systems = "hillinfer,host_scoring,reload,host_scoring_int4,host_scoring_held,reload_held,host_ranking"
    picture = tmp_path / "kvpath.svg"
    code, out, err = run(
        "--systems",
        systems,
        "--budget",
        "10%",
        "--rounds",
        2,
        "--profile",
        "none",
        "--plot",
        picture,
        "--json",
    )
    assert code == 0, err
    assert picture.read_bytes().startswith(b"<?xml")
    rows = json.loads(out)["rows"]
    assert [row["system"] for row in rows] == systems.split(",")
    for row in rows:
        assert row["kvpath_ms"] > 0
        assert row["drive_ms"] > 0
        assert (row["context_tokens"], row["key_precision"], row["shape"]) == (TOKENS, "int4", "8b")
    by_name = {row["system"]: row for row in rows}
    assert by_name["reload"]["miss_rate"] is None
    assert by_name["reload"]["moved_bytes"] >= TOKENS * 8 * 512
    assert by_name["host_scoring"]["moved_bytes"] >= TOKENS * 8 * 256
    assert by_name["hillinfer"]["moved_bytes"] < by_name["host_scoring_int4"]["moved_bytes"]
    for name, token_bytes in (("reload", 8 * 512), ("host_scoring", 8 * 256)):
        held = by_name[f"{name}_held"]
        assert held["moved_bytes"] < by_name[name]["moved_bytes"] - TOKENS // 10 * token_bytes
        assert held["resident_bytes"] <= by_name["hillinfer"]["resident_bytes"] + (2 << 20)
    assert by_name["host_ranking"]["moved_bytes"] < by_name["host_scoring_int4"]["moved_bytes"]
    assert 0 < by_name["hillinfer"]["miss_rate"] < 1
    code, _, err = run("--systems", "magic")
    assert code == 2
    assert "no such system: magic" in err
    file.write_bytes(b"nothing")
    assert "is not a recording" in run()[2]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--budget", "0.01%"), 2, "18 tokens or more"),
        (("--profile", "magic"), 1, "'magic' is not allowed"),
        (("--pool-dir", "/nowhere"), 1, "/nowhere"),
        (("--plot", "/proc/picture.svg"), 2, "/proc/picture.svg"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_recorded(options, code, said, monkeypatch, capsys):
    def record(*_):
        raise AssertionError("recorded")

    monkeypatch.setattr("hillinfer.bench.kvpath.recording.record", record)
    monkeypatch.setattr(sys, "argv", ["hillinfer", "bench", "kvpath", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert said in capsys.readouterr().err


def test_few_tokens_are_selected_too(recording, tmp_path):
    workload = make_workload(recording, SHAPES["8b"], seed=1)
    with rig(workload, "none", Precision.int4, 48 << 20, tmp_path) as ready:
        cache = ready.cache(Budget(tokens=21), SYSTEMS["hillinfer"](ready))
        (layer,) = cache.full_layers
        assert bring(layer, torch.from_numpy(workload.queries[0, 0])[None, :, None], 0.1)
        assert (layer.slots.ids != EMPTY).sum(-1).tolist() == [[4] * 8]
