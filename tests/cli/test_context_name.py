"""`hillinfer run --context-name`: read once, answered from then on, on a daemon that the runs share."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hillinfer import Session
from hillinfer.cli import main
from hillinfer.demo import make_demo
from hillinfer.model_directory import ModelDirectory, bundled_model
from hillinfer_core.errors import HillInferError
from hillinfer_core.protocol import attach_socket

COMMAND = Path(sys.executable).parent / "hillinfer"
MODEL = bundled_model()


class Place:
    """Where one user's daemon and pool are."""

    def __init__(self, folder):
        self.runtime = folder / "runtime"
        self.environment = {"HILLINFER_RUNTIME_DIR": str(self.runtime), "XDG_DATA_HOME": str(folder / "data")}

    def start(self, *command):
        return subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def connect(self):
        return Session.connect(attach_socket(self.runtime), arena_bytes=0)

    def daemon_pid(self):
        return int((self.runtime / "lock").read_text())

    def stop(self):
        if (self.runtime / "lock").exists() and alive(self.daemon_pid()):
            os.kill(self.daemon_pid(), signal.SIGTERM)
            assert wait_until(lambda: not alive(self.daemon_pid()))


def alive(pid):
    # Who started the daemon may have ended, or has not waited for it yet: then it is a zombie.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(true, seconds=30):
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def a_place(folder):
    place = Place(folder)
    try:
        yield place
    finally:
        place.stop()


@pytest.fixture
def place(tmp_path):
    with a_place(tmp_path) as place:
        yield place


@pytest.fixture(scope="module")
def demo():
    return make_demo(AutoTokenizer.from_pretrained(MODEL, local_files_only=True), 2048)


@pytest.fixture(scope="module")
def text(demo, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "context.txt"
    path.write_text(demo.context)
    return path


@pytest.fixture(scope="module")
def question(demo):
    return demo.questions[0]


def arguments(text, *asked, name="book", more=()):
    questions = [part for question in asked for part in ("--ask", question)]
    return ["run", "--model", MODEL, "--context", text, "--context-name", name, *questions, *more]


def outcome(process):
    out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    assert err == ""
    return out


def answers(report):
    return [(answer["text"], answer["new_tokens"]) for answer in report["answers"]]


@pytest.fixture(scope="module")
def kept(tmp_path_factory, text, demo):
    """A place where the text is kept as "book", and the report of the run that did it."""
    with a_place(tmp_path_factory.mktemp("kept")) as place:
        report = json.loads(outcome(place.start(COMMAND, *arguments(text, *demo.questions, more=["--json"]))))
        yield place, report


@pytest.fixture
def here(monkeypatch, capfd):
    """Return a function that runs the command in this process: exit code, standard output and error."""

    def run(place, command):
        for name, value in place.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["hillinfer", *(str(part) for part in command)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capfd.readouterr()

    return run


@pytest.fixture
def refused(here):
    """Return a function that runs as `here` does, and returns exit code and the one line of the refusal."""

    def run(place, command):
        code, out, err = here(place, command)
        assert out == ""
        assert err.startswith("hillinfer: ")
        assert err.count("\n") == 1, err
        return code, err

    return run


def test_the_first_run_reads_and_two_more_at_once_do_not(kept, text, demo):
    place, first = kept
    assert (first["context_name"], first["restored"], first["notes"]) == ("book", False, ["saved as book"])
    assert first["kv"]["cold_written_bytes"] >= 0.95 * first["kv"]["full_bytes"]
    for task, answer in zip(demo.tasks, first["answers"], strict=True):
        assert task.is_right(answer["text"])
    command = [COMMAND, *arguments(text, *demo.questions, more=["--json"])]
    for process in [place.start(*command), place.start(*command)]:
        report = json.loads(outcome(process))
        assert report["restored"]
        [note] = report["notes"]
        assert note.startswith("context book, saved 20")
        assert note.endswith(f"{first['context_tokens']:,} tokens, prefill skipped")
        assert answers(report) == answers(first)
        # Questions and answers alone are new.
        assert report["kv"]["cold_written_bytes"] < 0.2 * first["kv"]["cold_written_bytes"]
        assert report["kv"]["full_bytes"] == first["kv"]["full_bytes"]


def test_it_outlives_the_daemon(kept, text, demo, here):
    place, first = kept
    before = place.daemon_pid()
    place.stop()
    code, out, err = here(place, arguments(text, *demo.questions))
    assert (code, err) == (0, "")
    assert place.daemon_pid() != before
    assert "prefill skipped" in out
    assert "skipped, book was saved" in out
    for answer, _ in answers(first):
        assert f"\nA  {answer} " in out


def test_what_was_made_from_something_else_is_refused(refused, kept, text, question, tmp_path):
    place, first = kept
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "One more line.\n")
    same = arguments(text, question)
    for command, named in [
        (arguments(other, question), "differs in text"),
        ([trained(tmp_path / "trained") if part is MODEL else part for part in same], "differs in model"),
        ([*same, "--dtype", "float16"], "differs in dtype"),
        ([*same, "--precision", "int8"], "differs in precision"),
    ]:
        code, line = refused(place, command)
        assert code == 1
        assert named in line
        assert "choose another name, or `hillinferctl contexts delete book`" in line
    with place.connect() as session:
        [book] = session.list_contexts()
        assert (book.name, book.saved, book.tokens) == ("book", True, first["context_tokens"])


def trained(folder):
    """The bundled model after a step of training."""
    model = ModelDirectory(MODEL).load(torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn_like(weight)
    model.save_pretrained(folder)
    for path in MODEL.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["", " ", "x" * 300])
def test_bad_names(refused, kept, text, question, name):
    code, line = refused(kept[0], arguments(text, question, name=name))
    assert code == 2
    assert "name" in line


def test_a_run_killed_while_it_reads_leaves_nothing_in_the_way(
    place, demo, tmp_path, question, here, refused
):
    text = tmp_path / "long.txt"
    text.write_text(demo.context * 2)
    command = arguments(text, question, more=["--json"])
    doomed = place.start(COMMAND, *command)

    def is_reading():
        assert doomed.poll() is None
        try:
            with place.connect() as session:
                found = session.find_context("book")
        except HillInferError:
            return False
        return found is not None and found.tokens > 0

    assert wait_until(is_reading, 60)
    doomed.send_signal(signal.SIGSTOP)
    code, line = refused(place, command)
    assert code == 1
    assert "is reading a text into book now" in line
    doomed.kill()
    doomed.communicate()
    code, out, err = here(place, command)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert not report["restored"]
    assert "left unfinished" in report["notes"][0]
    assert report["notes"][1:] == ["saved as book"]
    with place.connect() as session:
        [book] = session.list_contexts()
        assert (book.saved, book.tokens) == (True, report["context_tokens"])


CLIENT = """
import sys
from hillinfer import shared_daemon
shared_daemon.IDLE_S = 1
with shared_daemon.connect(sys.argv[1]) as session:
    print(session.status().uptime_s > 0, flush=True)
    sys.stdin.read()
"""


def test_programs_that_start_at_once_share_one_daemon_that_ends_when_idle(place):
    def start(name):
        return subprocess.Popen(
            [sys.executable, "-c", CLIENT, name],
            env=os.environ | place.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    for _ in range(2):
        clients = [start(f"client {number}") for number in range(4)]
        assert [client.stdout.readline() for client in clients] == ["True\n"] * 4
        with place.connect() as session:
            named = {each.client_name for each in session.status().sessions}
        assert named >= {f"client {number}" for number in range(4)}
        pid = place.daemon_pid()
        clients[0].communicate()
        with place.connect():
            assert alive(pid)
        for client in clients[1:]:
            client.communicate()
        assert wait_until(lambda pid=pid: not alive(pid))


def test_a_daemon_that_cannot_start_says_why(refused, place, text, question, tmp_path):
    (tmp_path / "data").write_text("in the way")
    code, line = refused(place, arguments(text, question))
    assert code == 1
    assert "cannot start hillinferd" in line
