"""`make bench`: the commands that docs/ take their tables from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import typer.main

from hillinfer.commands import app


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "bench.py"
    spec = importlib.util.spec_from_file_location("bench_tool", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def test_every_command_is_one(tool: ModuleType) -> None:
    bench = typer.main.get_command(app).commands["bench"]  # type: ignore[attr-defined]
    assert set(tool.BENCHMARKS) == set(bench.commands)
    for commands in tool.BENCHMARKS.values():
        for line in commands:
            name, *arguments = line.split()
            bench.commands[name].make_context(name, arguments)


def test_what_is_asked_for_is_measured_and_kept(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.BENCHMARKS["transport"] = ["transport --calls 25", "transport --calls 26"]
    tool.main(["transport"])
    assert [path.name for path in (tmp_path / "build/bench").iterdir()] == ["transport.txt"]
    report = (tmp_path / "build/bench/transport.txt").read_text()
    for calls in (25, 26):
        assert f"hillinfer bench transport --calls {calls}\n20" in report
    assert report.count("load average") == 2
    assert report.count("ring") >= 2
    assert "-> build/bench/transport.txt" in capsys.readouterr().out


def test_a_failure_is_told(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as unknown:
        tool.main(["transport", "sharign"])
    assert unknown.value.code == 1
    assert "no benchmark sharign: there are kernel" in capsys.readouterr().err
    tool.BENCHMARKS["transport"] = ["transport --calls 1"]
    with pytest.raises(SystemExit, match="exit code 2"):
        tool.main(["transport"])
