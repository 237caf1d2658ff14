"""`hillinfer eval`, in this process: importing torch again for each run takes longer than all of them."""

import json
import sys
from dataclasses import asdict

import pytest
from transformers import AutoTokenizer

from hillinfer.cli import main
from hillinfer.eval.findings import Answer
from hillinfer.eval.job import Cell, Result
from hillinfer.eval.paired import differences, interval
from hillinfer.eval.plot import draw
from hillinfer.eval.prompts import TASKS, Question, make_prompt
from hillinfer.eval.report import as_markdown
from hillinfer.hkm import decode
from hillinfer.model_directory import bundled_model

SMALL = ("--context-tokens", 1024, "--budget", 80, "--prompts", 2, "--tasks", "single,multi_key", "--seed", 1)


@pytest.fixture
def evaluated(tmp_path, monkeypatch, capfd):
    """Return a function that runs `hillinfer eval` and returns its exit code, output and errors."""
    monkeypatch.setenv("HILLINFER_RUNTIME_DIR", str(tmp_path / "runtime"))

    def run(*arguments, command="eval"):
        monkeypatch.setattr(sys, "argv", ["hillinfer", command, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_model(), local_files_only=True)


def test_cells_metrics_and_picture(evaluated, tmp_path):
    picture = tmp_path / "accuracy.svg"
    policies = ("--policies", "full,hillinfer,recent,h2o", "--turns", 2, "--metrics", "--predictor", "exact")
    code, out, err = evaluated(*SMALL, *policies, "--json", "--plot", picture)
    assert code == 0, err
    assert err == ""
    report = json.loads(out)
    assert set(report) == {"model", "seed", "precision", "dtype", "cells", "differences", "metrics"}
    assert (report["model"], report["seed"], report["dtype"]) == ("needle-8m", 1, "float32")
    cells = report["cells"]
    assert [(cell["policy"], cell["task"], cell["turn"]) for cell in cells] == [
        (policy, task, turn)
        for task in ("single", "multi_key")
        for policy in ("full", "hillinfer", "recent", "h2o")
        for turn in (1, 2)
    ]
    for cell in cells:
        assert set(cell) == {
            *("policy", "task", "context_tokens", "budget", "turn", "accuracy", "prompts", "attended_tokens")
        }
        assert (cell["context_tokens"], cell["prompts"]) == (1024, 1)
        assert cell["budget"] == ("100%" if cell["policy"] == "full" else "80")
        assert cell["attended_tokens"] > 1000 if cell["policy"] == "full" else cell["attended_tokens"] == 80
    right = {policy: [c["accuracy"] for c in cells if c["policy"] == policy] for policy in ("full", "recent")}
    assert right["full"] == [1, 1, 1, 1]
    assert sum(right["recent"]) <= 1  # a note may happen to stand at the end
    metrics = {(row["policy"], row["layer"]): row for row in report["metrics"]}
    assert len(metrics) == 4 * 8
    assert metrics["full", 3]["captured_mass"] == pytest.approx(1, abs=1e-4)
    assert metrics["hillinfer", 3]["recall"] > 0.7 > metrics["h2o", 3]["recall"]
    assert metrics["hillinfer", 0]["query_cosine"] is None
    assert 0.5 < metrics["hillinfer", 5]["query_cosine"] <= 1
    assert "<svg" in picture.read_text()


def test_the_same_seed_gives_the_same_figures(evaluated):
    small = (
        "--context-tokens",
        512,
        "--budget",
        50,
        "--prompts",
        1,
        "--tasks",
        "multi_key",
        "--metrics",
        "--json",
    )
    first, again, other = (
        json.loads(evaluated(*small, "--policies", "hillinfer,h2o", "--seed", seed)[1]) for seed in (1, 1, 2)
    )
    assert first == again
    assert first["metrics"] != other["metrics"]


def test_a_budget_below_the_usual_pinned_tokens_is_honoured(evaluated):
    few = ("--context-tokens", 2048, "--budget", "1%", "--prompts", 2, "--tasks", "single")
    code, out, err = evaluated(*few, "--policies", "hillinfer,recent", "--predictor", "exact", "--json")
    assert code == 0, err
    ours, recent = json.loads(out)["cells"]
    # Of 2,048 tokens and a question, in steps that each round up.
    assert (ours["attended_tokens"], recent["attended_tokens"]) == pytest.approx((21, 21), abs=1)
    assert (ours["accuracy"], recent["accuracy"]) == (1, 0)


def test_several_processes_find_the_same(evaluated, tmp_path):
    small = ("--context-tokens", 512, "--budget", 60, "--prompts", 3, "--seed", 3, "--metrics", "--json")
    reports, files = [], [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for processes, file in enumerate(files, start=1):
        code, out, err = evaluated(*small, "--processes", processes, "--answers", file)
        assert (code, err) == (0, "")
        reports.append(json.loads(out))
    one, two = reports
    assert one["cells"] == two["cells"]
    assert one["differences"] == two["differences"]
    # Another number of threads sums in another order.
    for mine, theirs in zip(one["metrics"], two["metrics"], strict=True):
        assert mine == pytest.approx(theirs, abs=0.01, nan_ok=True)

    code, out, err = evaluated("--json", files[0], "--against", files[1], command="eval-report")
    assert code == 0, err
    (same,) = json.loads(out)["differences"]
    assert (same["points"], same["prompts"], same["budget"]) == (0, 3, "60")
    assert same["low"] < 0 < same["high"]
    picture = tmp_path / "again.png"
    code, out, err = evaluated("--json", *files[:1], "--plot", picture, command="eval-report")
    assert json.loads(out)["cells"] == one["cells"]
    assert json.loads(out)["differences"] == one["differences"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    # Another seed or interpreter has another text under the same number: those are more prompts, not pairs.
    answers = [json.loads(line) for line in files[1].read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(answer | {"text": "0" * 16}) + "\n" for answer in answers))
    code, out, err = evaluated(files[0], "--against", other, command="eval-report")
    assert code == 2
    assert "were not asked about the same texts" in err
    code, out, err = evaluated("--json", files[0], other, command="eval-report")
    assert code == 0, err
    pooled = json.loads(out)["differences"]
    assert [each["prompts"] for each in pooled] == [6 for _ in one["differences"]]
    assert [each["points"] for each in pooled] == [each["points"] for each in one["differences"]]
    full, mine = (
        [json.dumps(answer | {"text": text}) for answer in answers if answer["policy"] == policy]
        for policy, text in (("full", "0"), ("hillinfer", "1"))
    )
    other.write_text("\n".join([*full, *mine]))
    assert "were not asked about the same texts" in evaluated(other, command="eval-report")[2]
    code, out, err = evaluated(files[0], tmp_path / "none.jsonl", command="eval-report")
    assert code == 2
    assert err == f"hillinfer: cannot read {tmp_path / 'none.jsonl'}: No such file or directory\n"
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"policy": "full"}\n')
    assert "not been written by" in evaluated(torn, command="eval-report")[2]


def test_the_share_of_steps_that_attended_a_predicted_selection_is_told(evaluated, monkeypatch):
    used = []
    monkeypatch.setattr(
        decode, "_use", lambda layer, *more, use=decode._use: used.append(more[2]) or use(layer, *more)
    )
    small = ("--context-tokens", 1024, "--budget", 90, "--prompts", 1, "--tasks", "single")
    for predictor in ("auto", "next_layer", "exact"):
        used.clear()
        code, out, err = evaluated(*small, "--policies", "hillinfer", "--predictor", predictor, "--json")
        assert code == 0, err
        report = json.loads(out)
        predicted = sum(not job.sampled for job in used)
        if predictor == "exact":
            assert "predicted" not in report
            assert not used
        else:
            (told,) = report["predicted"]
            # Each step ranks once in each of the 8 layers.
            assert told["layer_steps"] % 8 == 0
            assert told["share"] == pytest.approx(predicted / told["layer_steps"], abs=1e-4)
        if predictor == "next_layer":
            assert told["share"] == 0.875, "the first layer has none before it"
            text = as_markdown(
                Result("m", 0, "int4", "float32", [Cell(**report["cells"][0])], predicted=[told])
            )
            assert f"88% of {told['layer_steps']} layer-steps attended a predicted selection" in text


def test_answers_of_before_stay_until_there_are_new_ones(evaluated, tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text("of a long run")
    code, _, _ = evaluated("--answers", answers, "--tasks", "riddles")
    assert (code, answers.read_text()) == (2, "of a long run")


def test_answers_that_come_again_count_once(evaluated, tmp_path):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    # Another turn, prompt, text or budget is another answer.
    changes = ({}, {"turn": 2}, {"prompt": 7}, {"text": "b"}, {"budget": "2%"}, {"policy": "full"})
    answers = [
        asdict(Answer("hillinfer", "single", 1024, "1%", 1, 0, 1, 40.0, "a")) | each for each in changes
    ]
    one.write_text("".join(json.dumps(each) + "\n" for each in answers))
    # Of a run that was begun again; the first answer stands.
    other.write_text("".join(json.dumps(each | {"score": 0}) + "\n" for each in answers[:3]))
    code, out, err = evaluated("--json", one, other, one, command="eval-report")
    assert code == 0
    assert err == "9 answers came again to the same questions: left out\n"
    assert json.loads(out)["cells"] == json.loads(evaluated("--json", one, command="eval-report")[1])["cells"]
    assert sum(cell["prompts"] for cell in json.loads(out)["cells"]) == len(changes)


def test_differences_are_paired_by_prompt_and_pooled_over_lengths():
    def answers(policy, budget, scores):
        return [
            Answer(policy, "single", tokens, budget, 1, prompt, score, None)
            for tokens, each in scores.items()
            for prompt, score in enumerate(each)
        ]

    full = answers("full", "100%", {4096: [1, 1, 0, 1], 8192: [1, 1]})
    mine = answers("hillinfer", "2%", {4096: [1, 0, 1, 1], 8192: [1, 0]})
    found = differences([*full, *mine])
    assert [(each.context_tokens, each.points, each.prompts) for each in found] == [
        ((4096,), 0, 4),
        ((8192,), -50, 2),
        ((4096, 8192), pytest.approx(-100 / 6, abs=0.01), 6),
    ]


def test_the_interval_of_differences():
    # Of 100 pairs 9 are right in one alone and 4 in the other alone.
    mean, low, high = interval([1] * 9 + [-1] * 4 + [0] * 87)
    centre, variance = 5 / 102, ((13 + 1) - 25 / 102) / 102**2
    assert mean == pytest.approx(0.05)
    assert (low, high) == pytest.approx((centre - 1.96 * variance**0.5, centre + 1.96 * variance**0.5))
    # Never wrong is not certainty.
    assert interval([0] * 100)[1] < -0.01


def test_markdown_and_perplexity(evaluated):
    code, out, err = evaluated(
        *("--context-tokens", 512, "--budget", 60, "--prompts", 1, "--tasks", "chain2", "--markdown"),
        *("--policies", "full,oracle,recent", "--precision", "int8", "--perplexity"),
    )
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "**needle-8m, float32, int8 evaluation keys, seed 0**"
    assert "| policy | budget | attended tokens | chain2 | all answers |" in lines
    rows = [line.split(" | ") for line in lines if line.startswith("| 512 | ")]
    assert [row[1] for row in rows] == ["full", "oracle", "recent"]
    full, oracle, recent = (float(row[3]) for row in rows)
    assert 1 < full < recent
    assert abs(oracle - full) < abs(recent - full)


def test_every_task_is_in_its_text_and_follows_its_seed(tokenizer):
    for task in TASKS:
        prompt = make_prompt(task, tokenizer, 1024, 3, "1 1024 0")
        assert prompt == make_prompt(task, tokenizer, 1024, 3, "1 1024 0")
        assert prompt.context != make_prompt(task, tokenizer, 1024, 3, "2 1024 0").context
        assert 1000 < len(tokenizer(prompt.context)["input_ids"]) < 1100
        assert len({question.text for question in prompt.questions}) == 3
        for question in prompt.questions:
            assert question.score(" ".join(question.answers)) == 1
            assert question.score("nothing") == 0
            for answer in question.answers:
                assert prompt.context.count(answer) >= 1
                assert answer not in prompt.continuation


def test_a_chain_leads_to_the_answer(tokenizer):
    prompt = make_prompt("chain3", tokenizer, 1024, 2, "5")
    pairs = (line[4:].split(" := ") for line in prompt.context.splitlines() if line.startswith("VAR "))
    links = dict(pairs)
    assert len(links) == 2 * 4
    for question in prompt.questions:
        name = question.text.split()[2]
        for _ in range(3):
            name = links[name].removeprefix("VAR ")
        assert (links[name],) == question.answers


def test_of_several_answers_the_share_counts():
    assert Question("?", ("11", "22", "33", "44")).score("11, 33") == 0.5


def test_the_picture_has_every_length_and_turn(tmp_path):
    cells = [
        Cell(policy, "single", tokens, budget, turn, 0.5, 4, 80.0)
        for policy, budgets in (("full", ["100%"]), ("hillinfer", ["1%", "2%"]))
        for budget in budgets
        for tokens in (4096, 8192)
        for turn in (1, 2)
    ]
    result = Result("a model", 0, "int4", "float32", cells)
    draw(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    draw(result, tmp_path / "a.svg")
    assert "8,192 context tokens" in as_markdown(result)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policies", "full,best"], "no such policy: best"),
        (["--policies", ","], "no such policy"),
        (["--policies", "full,full"], "named twice"),
        (["--tasks", "riddles"], "no such task: riddles"),
        (["--budget", "0.4%", "--context-tokens", 4096], "18 tokens or more"),
        (["--budget", "some"], "budget"),
        (["--prompts", 2], "3 tasks"),
        (["--context-tokens", 65536], "65536"),
        (["--dtype", "float8"], "no such dtype: float8"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--model", "/nowhere"], "not a directory"),
        (["--plot", "picture.gif"], ".png or .svg"),
        (["--plot", "/nowhere/picture.png"], "not a directory"),
        (["--plot", "/proc/picture.png"], "cannot write /proc/picture.png"),
    ],
)
def test_what_cannot_work_says_so_in_one_line(evaluated, arguments, said):
    code, out, err = evaluated(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("hillinfer: ")
    assert err.count("\n") == 1, err
    assert said in err


def test_without_matplotlib_the_extra_is_named(evaluated, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = evaluated("--plot", "picture.png")
    assert (code, err) == (2, "hillinfer: matplotlib is not installed: pip install 'hillinfer[plots]'\n")


def test_a_share_of_the_attention_in_the_place_of_a_budget(evaluated):
    small = (*SMALL[:4], "--prompts", 1, "--tasks", "single", "--policies", "hillinfer")
    code, out, err = evaluated(*small, "--min-mass", 0.8, "--precision", "int8", "--metrics", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert [cell["budget"] for cell in report["cells"]] == ["80", "mass>=0.8"]
    (mass,) = report["mass"]
    assert (mass["kind"], mass["budget"], mass["context_tokens"]) == ("bound", "mass>=0.8", 1024)
    assert 0.8 <= mass["least"] <= mass["mean"]
    asked = [row for row in report["metrics"] if row["budget"] == "mass>=0.8"]
    assert all(row["captured_mass"] >= 0.8 for row in asked)
    assert report["cells"][1]["attended_tokens"] > 80
    assert "mass>=0.8, 1,024 context tokens: bound" in as_markdown(
        Result("m", 0, "int8", "float32", cells=[Cell(**report["cells"][0])], mass=report["mass"])
    )
    code, _, err = evaluated(*SMALL, "--policies", "recent", "--min-mass", 0.8)
    assert code == 2
    assert "--policies" in err
