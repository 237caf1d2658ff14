import os
import subprocess
import sys
from pathlib import Path


def test_example_answers_its_questions():
    example = Path(__file__).parents[2] / "examples" / "generate.py"
    done = subprocess.run(
        [sys.executable, str(example)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *answers, report = done.stdout.splitlines()
    assert len(answers) == 4
    for line in answers:
        right = line.split("(right: ")[1].rstrip(")")
        assert f" {right}" in line.split("   (")[0], line
    assert "resident at most" in report
