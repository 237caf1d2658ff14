"""The Session example runs as it is shipped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "session.py"


def test_the_session_example_finds_the_planted_token(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        env={**os.environ, "HILLINFER_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "[1234, 1234] (planted: 1234)" in done.stdout
    difference = re.search(r"full attention: ([\d.]+)", done.stdout)
    assert difference is not None
    assert float(difference.group(1)) < 0.01
