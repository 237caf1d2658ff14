"""The example that uses the plain gRPC API runs as it is shipped, and without our libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "grpc_client.py"
PLANTED = [5, 700, 1234, 2048, 3071, 3072, 4000, 4095]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60, check=False)


def test_the_example_finds_the_planted_tokens(daemon: Path) -> None:
    done = run(str(EXAMPLE), str(daemon))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [f"KV head {head}: {PLANTED}" for head in range(2)]
    assert "the same tokens" in done.stdout


def test_it_needs_the_stubs_only(daemon: Path, tmp_path: Path) -> None:
    # Made anew of proto/, in a directory where nothing else of ours can be imported.
    package = tmp_path / "hillinfer_core" / "v1"
    package.mkdir(parents=True)
    for directory in (package.parent, package):
        (directory / "__init__.py").touch()
    names = [f"hillinfer_core/v1/{name}.proto" for name in ("attach", "cold_pool")]
    protoc = ["-m", "grpc_tools.protoc", f"-Ihillinfer_core/v1={ROOT / 'proto/hillinfer/v1'}"]
    made = run(*protoc, f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", *names)
    assert made.returncode == 0, made.stderr
    check = (
        "import runpy, sys\n"
        f"sys.path += [{str(tmp_path)!r}, {str(Path(np.__file__).parents[1])!r}]\n"
        f"sys.argv = ['example', {str(daemon)!r}]\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
        "ours = [m.__file__ for n, m in sys.modules.items() if n.partition('.')[0].startswith('hillinfer')]\n"
        f"assert ours and all(file.startswith({str(tmp_path)!r}) for file in ours), ours\n"
    )
    # Without site, which would find what is installed in editable mode.
    done = run("-S", "-c", check)
    assert done.returncode == 0, done.stderr
    assert "the same tokens" in done.stdout


def test_refusals_are_one_line(tmp_path: Path, daemon: Path) -> None:
    source = EXAMPLE.read_text()
    assert "LAYOUT_VERSION = 3, 2" in source
    other = tmp_path / "other.py"
    other.write_text(source.replace("LAYOUT_VERSION = 3, 2", "LAYOUT_VERSION = 3, 99"))
    done = run(str(other), str(daemon))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("refused: VersionMismatch: ")
    assert os.linesep not in done.stderr.strip()
