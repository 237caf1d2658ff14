"""Runs the installed command as a user would, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def hillinfer(tmp_path):
    """Return a function that runs `hillinfer` in a pipe, with no daemon and no pool at the usual places."""
    command = Path(sys.executable).parent / "hillinfer"
    environment = os.environ | {
        "HILLINFER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "XDG_DATA_HOME": str(tmp_path / "data"),
    }

    def run(*arguments, **changes):
        return subprocess.run(
            [command, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
            env=environment | changes,
        )

    return run
