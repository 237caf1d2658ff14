"""docs/security.md names a test for every line, and every test of this suite has its line."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs/security.md").read_text()
NAMED = set(re.findall(r"`(test_\w+)`", TEXT))


def _functions(paths: list[Path]) -> set[str]:
    return {name for path in paths for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.M)}


def test_every_test_that_the_threat_model_names_is_there() -> None:
    assert NAMED
    assert NAMED - _functions(list(TESTS.rglob("test_*.py"))) == set()
    files = set(re.findall(r"`(test_\w+\.py)`", TEXT))
    assert files - {path.name for path in TESTS.rglob("test_*.py")} == set()


def test_every_line_of_the_threat_model_names_a_test() -> None:
    lines = [line for line in TEXT.splitlines() if line.startswith("| ")]
    headings = [line for line in lines if line.endswith(("| Test |", "--- |", "| | |"))]
    assert len(lines) - len(headings) > 50
    assert [line for line in lines if line not in headings and "`test_" not in line] == []


def test_every_test_of_this_suite_has_its_line() -> None:
    here = _functions(list(Path(__file__).parent.glob("test_*.py"))) - _functions([Path(__file__)])
    assert here - NAMED == set()
