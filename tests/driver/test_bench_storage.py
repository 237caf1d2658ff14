"""The storage benchmark runs and says what it should; how fast is not for a test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hillinferd.bench import storage


def test_compares_with_fio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not shutil.which("fio"):
        pytest.skip("fio is not installed")
    options = ["--path", str(tmp_path / "pool"), "--size", str(16 << 20), "--rounds", "2", "--seconds", "0.1"]
    storage.main([*options, "--json"])
    append, gather = json.loads(capsys.readouterr().out)
    assert (append["unit"], gather["unit"]) == ("MB/s", "rows/s")
    for row in (append, gather):
        assert row["fio"] > 0
        assert row["ours"] > 0
        assert len(row["ratios"]) == 2
    assert list(tmp_path.iterdir()) == []
    storage.main(options)
    assert "ratio" in capsys.readouterr().out


def test_measures_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--path", str(tmp_path / "pool"), "--seconds", "0.02", "--size", "1"]
    storage.main([*options, "--profile", "smartssd", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert {figure["unit"] for figure in figures} == {"MB/s", "rows/s", "us"}
    assert all(min(figure["expected"], figure["one"], figure["four"]) > 0 for figure in figures)


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pool").write_bytes(b"content")
    for options in (["--path", str(tmp_path / "pool")], ["--profile", "tape"]):
        with pytest.raises(SystemExit):
            storage.main(options)
        assert capsys.readouterr().err.startswith("bench storage: ")
    assert (tmp_path / "pool").read_bytes() == b"content"
