"""What cannot work says so in one line and exits with code 2."""

import json
import shutil
import sys

import pytest

from hillinfer.cli import main
from hillinfer.files import check_writable
from hillinfer.model_directory import bundled_model
from hillinfer_core.errors import InvalidInput

MODEL = bundled_model()


@pytest.fixture
def context(tmp_path):
    path = tmp_path / "context.txt"
    path.write_text("VAR misty_harbor := 12345\n" * 400)
    return path


@pytest.fixture
def refused(context, tmp_path, monkeypatch, capfd):
    """Return a function that runs with one thing wrong and returns the line that says what."""
    monkeypatch.setenv("HILLINFER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # `main` sets its own

    def run(*arguments, model=MODEL, context=context, ask="print VAR misty_harbor ->"):
        command = ["hillinfer", "run", "--model", model, "--context", context, "--ask", ask, *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        # In this process: importing torch again for each of them takes longer than all of them.
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert ended.value.code == 2, err
        assert out == ""
        assert err.startswith("hillinfer: ")
        assert err.count("\n") == 1, err
        return err

    return run


def test_in_a_process_of_its_own(hillinfer, context, tmp_path):
    socket = tmp_path / "nothing.sock"
    done = hillinfer("run", "--model", MODEL, "--context", context, "--ask", "?", "--socket", socket)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("hillinfer: ")
    assert done.stderr.count("\n") == 1


def test_no_daemon_at_the_socket_named(refused, tmp_path):
    socket = tmp_path / "nothing.sock"
    assert str(socket) in refused("--socket", socket)


def test_no_share_of_the_cpu(refused):
    assert "auto, or 0 to 1, not 'half'" in refused("--cpu-share", "half")


@pytest.mark.parametrize(
    "arguments", [{"ask": "what \udcff"}, {"arguments": ("--context-name", "a\udcff", "--json")}]
)
def test_no_text(refused, arguments):
    assert "is no UTF-8 text" in refused(*arguments.pop("arguments", ()), **arguments)


def test_no_such_model_directory(refused, tmp_path):
    assert "not a directory" in refused(model=tmp_path / "nothing")


def test_no_weights(refused, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path)
    assert "no weights" in refused(model=tmp_path)


def test_no_configuration(refused, tmp_path):
    assert "no config.json" in refused(model=tmp_path)


def test_no_tokeniser(refused, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MODEL / name, tmp_path)
    said = refused(model=tmp_path)
    assert f"{tmp_path} has no tokeniser" in said or "cannot read the tokeniser" in said
    # Of a family for which transformers makes an empty one.
    config = json.loads((MODEL / "config.json").read_text())
    for family in ("qwen3", "opt", "gpt_neox"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": family}))
        assert (
            f"{tmp_path} has no tokeniser: put the model's tokenizer_config.json and tokenizer.json there"
            in refused(model=tmp_path)
        )


def test_weights_that_are_not_weights(refused, tmp_path):
    for path in MODEL.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    assert "cannot read the weights" in refused(model=tmp_path)


def test_context_longer_than_the_models_positions(refused, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("x = 1\n" * 30_000)
    assert "65536 positions" in refused(context=long)


def test_no_such_context(refused, tmp_path):
    assert "cannot read the context" in refused(context=tmp_path / "nothing.txt")


def test_context_that_is_not_text(refused, tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\xfd")
    assert "not UTF-8" in refused(context=binary)


def test_empty_context(refused, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "empty" in refused(context=empty)


def test_empty_question(refused):
    assert "question" in refused(ask="  ")


@pytest.mark.parametrize("budget", ["17", "0.1%"])
def test_budget_that_leaves_nothing_to_select(refused, budget):
    assert "18 tokens or more" in refused("--budget", budget)


@pytest.mark.parametrize("budget", ["0%", "two", "101%", "-1"])
def test_no_budget(refused, budget):
    assert "budget" in refused(f"--budget={budget}")


def test_no_size(refused):
    assert "not a size" in refused("--resident", "64 apples")


def test_resident_too_small_for_the_context(refused):
    assert "raise resident" in refused("--resident", "100KiB")


def test_the_parser_refuses_what_it_does_not_know(hillinfer):
    done = hillinfer("demo", "--precision", "int3")
    assert done.returncode == 2
    assert "int3" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_budget_and_a_share_of_the_attention_together(refused):
    assert "--min-mass" in refused("--min-mass", 0.9, "--budget", "2%")


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_share_of_the_attention_that_is_none(refused, share):
    assert "share of the attention" in refused("--min-mass", share)


@pytest.mark.parametrize("option", ["--trace", "--trace-plot"])
def test_a_trace_that_cannot_be_written_is_refused_before_the_work(refused, tmp_path, option):
    said = refused(option, tmp_path / "nowhere" / "trace.svg", model=tmp_path / "nothing")
    assert str(tmp_path / "nowhere") in said
    assert str(tmp_path / "nothing") not in said


def test_looking_whether_a_file_can_be_written_leaves_it_as_it_was(tmp_path):
    there, new = tmp_path / "there", tmp_path / "new"
    there.write_text("kept")
    for file in (there, new, None):
        check_writable(file)
    assert there.read_text() == "kept"
    assert not new.exists()
    with pytest.raises(InvalidInput, match="Is a directory"):
        check_writable(tmp_path)
