"""Whole runs with a private daemon, their output caught in a pipe."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hillinfer.demo import make_demo
from hillinfer.model_directory import bundled_model
from hillinfer.private_daemon import PrivateDaemon

UNIGNORED = ("env", "--default-signal=INT")
"""What shells start in the background ignores ^C, and so would whatever it starts."""

KEYS = {
    "model",
    "context_tokens",
    "context_name",
    "restored",
    "notes",
    "prefill_s",
    "time_to_first_answer_s",
    "total_s",
    "answers",
    "kv",
    "mass",
}
KV_KEYS = {
    "full_bytes",
    "resident_peak_bytes",
    "resident",
    "cold_written_bytes",
    "cold_read_bytes",
    "evaluated_bytes",
    "hot_hit_rate",
    "predictors",
    "hidden_share",
    "split",
}


@pytest.fixture(scope="module")
def demo():
    tokenizer = AutoTokenizer.from_pretrained(bundled_model(), local_files_only=True)
    return make_demo(tokenizer, 4096)


def test_demo_answers_through_the_cold_pool(hillinfer, demo):
    done = hillinfer("demo", "--context-tokens", 4096, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert set(report) == KEYS
    assert report["mass"] is None
    assert (report["context_name"], report["restored"], report["notes"]) == (None, False, [])
    assert 0 < report["prefill_s"] < report["time_to_first_answer_s"] < report["total_s"]
    assert report["model"] == "needle-8m"
    assert report["context_tokens"] >= 4096
    assert [answer["question"] for answer in report["answers"]] == demo.questions
    for task, answer in zip(demo.tasks, report["answers"], strict=True):
        assert set(answer) == {"question", "text", "new_tokens", "ttft_s", "decode_tokens_per_s"}
        assert task.is_right(answer["text"]), (task, answer)
    kv = report["kv"]
    assert set(kv) == KV_KEYS
    assert kv["full_bytes"] >= report["context_tokens"] * 8 * 2 * 2 * 64 * 4
    assert sum(kv["resident"].values()) == kv["resident_peak_bytes"]
    assert kv["cold_written_bytes"] >= 0.95 * kv["full_bytes"]
    assert kv["evaluated_bytes"] > 0
    assert 0 <= kv["hot_hit_rate"] <= 1


def test_demo_with_a_share_of_the_attention_instead_of_a_budget(hillinfer, demo):
    done = hillinfer("demo", "--context-tokens", 2048, "--min-mass", 0.8, "--json")
    assert done.returncode == 0, done.stderr
    mass = json.loads(done.stdout)["mass"]
    assert (mass["kind"], mass["target"]) == ("bound", 0.8)
    assert 0.8 <= mass["least"] <= mass["mean"] <= 1
    assert len(mass["attended"]) == 8
    assert max(mass["attended"]) > 5 * min(mass["attended"]), "layers need very different numbers of tokens"


def test_run_on_a_daemon_that_is_there_speaks_plainly(hillinfer, demo, tmp_path):
    context = tmp_path / "context.txt"
    context.write_text(demo.context)
    ask = [part for task in demo.tasks[:2] for part in ("--ask", task.question)]
    with PrivateDaemon() as daemon:
        done = hillinfer(
            *("run", "--model", bundled_model(), "--context", context, *ask),
            *("--budget", "128", "--resident", "24MiB", "--precision", "int8", "--dtype", "float32"),
            *("--socket", daemon.socket, "--cpu-share", "0.5"),
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\r" not in done.stdout, "a progress bar in a pipe"
    assert "\x1b" not in done.stdout, "colours in a pipe"
    for task in demo.tasks[:2]:
        assert f"Q  {task.question}\nA  {task.answer}." in done.stdout
    for line in (
        "prefill",
        "first answer",
        "decode",
        "full KV",
        "resident, peak",
        "cold pool written",
        "hot hit rate",
        "ranked by the CPU",
    ):
        assert line in done.stdout


def test_without_a_budget_a_short_text_is_answered_too(hillinfer):
    # 2 % of it would be 11 tokens.
    done = hillinfer("demo", "--context-tokens", 512, "--json", "--predictor", "exact")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)["answers"]
    tokenizer = AutoTokenizer.from_pretrained(bundled_model(), local_files_only=True)
    for task, answer in zip(make_demo(tokenizer, 512).tasks, answers, strict=True):
        assert task.is_right(answer["text"]), (task, answer)


@pytest.mark.parametrize(("ending", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_leaves_no_pool_and_no_daemon(tmp_path, ending, code):
    # One of eval, whose pool lies in a file of its own from the beginning.
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # sockets' names are short
    command = [Path(sys.executable).with_name("hillinfer"), "eval", "--prompts", "90", "--tasks", "single"]
    environment = os.environ | {"TMPDIR": str(temporary), "HILLINFER_RUNTIME_DIR": str(tmp_path)}
    running = subprocess.Popen(
        [*UNIGNORED, *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        waits = time.monotonic() + 60
        while not any(temporary.glob("hillinfer-eval-*/*.pool")):
            assert running.poll() is None, running.stderr.read()
            assert time.monotonic() < waits
            time.sleep(0.1)
        running.send_signal(ending)
        _, err = running.communicate(timeout=60)
        assert running.returncode == code, err
        assert list(temporary.glob("hillinfer*")) == []
    finally:
        running.kill()
        shutil.rmtree(temporary)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_in_a_finaliser_still_stops_the_command(ending):
    # Python drops what is raised there; regex's objects have such finalisers, and ^C was lost in one.
    command = (
        "import signal, sys, time, types\n"
        "from hillinfer.cli import main\n"
        "class Finalised:\n"
        "    def __del__(self):\n"
        f"        signal.raise_signal({ending})\n"
        "def app(prog_name):\n"
        "    Finalised()\n"
        "    time.sleep(60)\n"
        "    print('not stopped')\n"
        "sys.modules['hillinfer.commands'] = types.SimpleNamespace(app=app)\n"
        "main()\n"
    )
    command = [*UNIGNORED, sys.executable, "-c", command]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 143}[ending], done.stderr
    assert "not stopped" not in done.stdout


def test_help_imports_neither_torch_nor_transformers():
    check = (
        "import sys; sys.argv = ['hillinfer', '--help']\n"
        "from hillinfer.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0


def test_a_missing_extra_is_named():
    # None in sys.modules is how Python itself records that a module cannot be imported.
    check = (
        "import sys; sys.modules['transformers'] = None; sys.argv = ['hillinfer', 'demo']\n"
        "from hillinfer.cli import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", check], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'hillinfer[transformers]'" in done.stderr
