"""The trace of a run: what Perfetto needs, spans that fit one another, and the share that was hidden."""

import json
from itertools import pairwise

import pytest
import torch
from small_models import COMMON
from test_exactness import ARENA, prompt
from transformers import LlamaConfig, LlamaForCausalLM

import hillinfer
from hillinfer.pipeline.timeline import COMPUTE, EVALUATE, LATE, MODEL, WAIT, WORKER, hidden_share
from hillinfer.pipeline.trace import draw_trace, write_trace

STEPS, LAYERS = 6, 3


@pytest.fixture(scope="module")
def spans(daemon):
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**{**COMMON, "num_hidden_layers": LAYERS})).eval()
    ids, _ = prompt(1, 500, False)
    with (
        torch.inference_mode(),
        hillinfer.Session.connect(daemon.socket, arena_bytes=ARENA) as session,
        hillinfer.attach(model, session=session, budget=100, predictor="next_layer", trace=True) as attached,
    ):
        model(ids, past_key_values=attached.new_cache())
        assert attached.trace() == []
        for _ in range(STEPS):
            model(ids[:, :1], past_key_values=attached.last_cache)
        spans = attached.trace()
        assert attached.report().hidden_share == pytest.approx(
            hidden_share((each.lane, each.name, each.end - each.start) for each in spans)
        )
    return spans


def test_the_file_is_in_the_trace_event_format(spans, tmp_path):
    write_trace(tmp_path / "trace.json", spans)
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert 0 <= trace["otherData"]["hidden_share"] <= 1
    named = {each["tid"]: each["args"]["name"] for each in trace["traceEvents"] if each["ph"] == "M"}
    events = [each for each in trace["traceEvents"] if each["ph"] == "X"]
    assert set(named.values()) == {"model", "worker"}
    assert len(events) == len(spans)
    assert min(each["ts"] for each in events) == 0
    for each in events:
        assert each["dur"] >= 0
        assert each["tid"] in named
        assert set(each["args"]) == {"step", "layer"}


def test_every_layer_computes_before_its_attention_and_the_last_one_after_it_too(spans):
    for step in range(STEPS):
        computing = [each.layer for each in spans if each.name == COMPUTE and each.step == step]
        assert set(computing) == set(range(LAYERS))
        assert computing[-2:] == [LAYERS - 1, LAYERS - 1]


@pytest.mark.parametrize("lane", [MODEL, WORKER])
def test_spans_of_a_lane_nest_or_follow_one_another(spans, lane):
    open_until = []
    mine = sorted((each for each in spans if each.lane == lane), key=lambda each: (each.start, -each.end))
    for each in mine:
        while open_until and open_until[-1] <= each.start:
            open_until.pop()
        assert not open_until or each.end <= open_until[-1]
        open_until.append(each.end)


def test_each_layer_is_asked_for_ahead_in_each_step(spans):
    for step in range(STEPS):
        for layer in range(LAYERS):
            mine = {
                (each.lane, each.name): each for each in spans if (each.step, each.layer) == (step, layer)
            }
            assert (MODEL, EVALUATE) not in mine
            assert mine[WORKER, EVALUATE].end <= mine[MODEL, WAIT].end
            assert mine[MODEL, "predict"].end <= mine[MODEL, WAIT].start
    starts = [each.start for each in spans if each.name == WAIT]
    assert all(one < other for one, other in pairwise(starts))


def test_what_is_hidden():
    assert hidden_share([]) is None
    assert hidden_share([(MODEL, EVALUATE, 1.0)]) == 0
    assert hidden_share([(WORKER, EVALUATE, 4.0), (MODEL, WAIT, 1.0)]) == 0.75
    assert hidden_share([(WORKER, EVALUATE, 3.0), (MODEL, LATE, 1.0), (MODEL, "compute", 9.0)]) == 0.75
    assert hidden_share([(WORKER, EVALUATE, 1.0), (MODEL, WAIT, 2.0)]) == 0


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_picture(spans, tmp_path, kind):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"trace.{kind}"
    draw_trace(path, spans)
    assert path.stat().st_size > 5000
