"""The generated code in the tree is what `make proto` makes of proto/ today."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "core" / "hillinfer_core" / "v1"
PROTO_PATH = "hillinfer_core/v1"


def test_generated_code_is_up_to_date(tmp_path):
    pytest.importorskip("grpc_tools")
    names = sorted(path.name for path in (ROOT / "proto" / "hillinfer" / "v1").glob("*.proto"))
    command = [
        sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO_PATH}={ROOT / 'proto' / 'hillinfer' / 'v1'}",
        f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}",
        *(f"{PROTO_PATH}/{name}" for name in names),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    fresh = {path.name: path.read_text() for path in (tmp_path / PROTO_PATH).iterdir()}
    kept = {path.name: path.read_text() for path in GENERATED.glob("*_pb2*.py*")}
    assert kept.keys() == fresh.keys(), "run make proto"
    for name, text in fresh.items():
        assert kept[name] == text, f"{name} is out of date: run make proto"
