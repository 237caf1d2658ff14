"""What `--help` prints: text in square brackets is markup to it, and would be left out."""

from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import hillinferd.ctl
import hillinferd.main
from hillinfer.commands import app

# One option for each file of commands that has defaults in words.
DEFAULTS = [
    ("run", "--resident", "the larger of 16MiB and a quarter of the context's KV, and sliding windows"),
    ("run", "--cpu-share", "none"),
    ("run", "--dtype", "the model's own"),
    ("eval", "--dtype", "the model's; bundled: float32"),
    ("bench recall", "--model", "the bundled one"),
    ("bench decode", "--readings", "1; paced or with a recording none"),
    ("bench kvpath", "--systems", "all; an unknown name lists them"),
]


@pytest.mark.parametrize(("command", "option", "default"), DEFAULTS)
def test_a_default_in_words_is_printed(command, option, default):
    done = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if f" {option} " in line]
    assert f"[default: ({default})]" in line


def commands(command: Any) -> Iterator[Any]:
    yield command
    for child in getattr(command, "commands", {}).values():
        yield from commands(child)


@pytest.mark.parametrize("app", [app, hillinferd.ctl.app, hillinferd.main.app])
def test_no_help_has_square_brackets(app):
    for command in commands(typer.main.get_command(app)):
        told = [command.help or "", *(getattr(param, "help", None) or "" for param in command.params)]
        assert not [text for text in told if "[" in text], command.name
