from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import hillinferd.ctl
from hillinferd.config import DRIVE_KEYS, KEYS

TOOL = Path(__file__).parents[2] / "tools" / "manual.py"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("manual")
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "0"}
    subprocess.run([sys.executable, TOOL, directory], check=True, timeout=100, env=environment)
    return directory


def plain(page: Path) -> str:
    return page.read_text().replace("\\-", "-").replace("\\fB", "").replace("\\fR", "")


def commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    for name, child in getattr(command, "commands", {}).items():
        yield f"{path} {name}", child
        yield from commands(f"{path} {name}", child)


def test_every_command_and_option_has_its_place(built: Path) -> None:
    text = plain(built / "man" / "hillinferctl.8")
    assert '"1970-01-01"' in text
    found = list(commands("hillinferctl", typer.main.get_command(hillinferd.ctl.app)))
    assert len(found) > 12
    for path, command in found:
        if not hasattr(command, "commands"):
            assert f".SS {path}" in text
            section = text.split(f".SS {path}")[1].split(".SS")[0]
            assert all(
                option in section for param in command.params for option in param.opts if "-" in option
            )


def test_every_key_of_the_configuration_is_explained(built: Path) -> None:
    text = plain(built / "man" / "hillinferd.toml.5")
    assert all(f"\n{key.name}\n" in text for key in (*KEYS, *DRIVE_KEYS))
    assert "--metrics-file" in plain(built / "man" / "hillinferd.8")


def test_pages_are_good_roff(built: Path) -> None:
    if not shutil.which("mandoc"):
        pytest.skip("mandoc is not installed")
    pages = sorted((built / "man").iterdir())
    assert [page.name for page in pages] == [
        "hillinfer.1",
        "hillinferctl.8",
        "hillinferd.8",
        "hillinferd.toml.5",
    ]
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", *pages], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.parametrize(
    ("program", "line", "offered"),
    [
        ("hillinferctl", "hillinferctl s", {"status", "sessions"}),
        ("hillinferctl", "hillinferctl cec r", {"rollback"}),
        ("hillinfer", "hillinfer de", {"demo"}),
    ],
)
def test_bash_completes(built: Path, program: str, line: str, offered: set[str]) -> None:
    script = built / "completions" / "bash" / program
    words = line.split()
    ask = f"""
        . {script}
        COMP_WORDS=({line}) COMP_CWORD={len(words) - 1}
        _{program}_completion {program}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", ask],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PATH": path},
    )
    assert set(done.stdout.split()) == offered
