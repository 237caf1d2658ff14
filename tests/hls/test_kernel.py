"""The HLS kernel in C simulation, and its arithmetic in RTL simulation, on the shared vectors."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HLS = ROOT / "hls"

pytestmark = pytest.mark.timeout(600)  # compiling under the sanitisers takes half a minute of a slow machine


def need(tools=(), packages=()):
    """Skip, or fail where HILLINFER_REQUIRE_ALL is set, with a line on what is missing."""
    missing = [f"the program {tool}" for tool in tools if shutil.which(tool) is None]
    missing += [f"the package {name}" for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return
    reason = f"needs {', '.join(missing)} (hls/README.md)"
    if os.environ.get("HILLINFER_REQUIRE_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)


def make(target, build, **variables):
    command = ["make", "-C", str(HLS), target, f"BUILD={build}", f"PYTHON={sys.executable}"]
    command += [f"{name}={value}" for name, value in variables.items()]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return tmp_path_factory.mktemp("hls")


@pytest.mark.parametrize("target", ["csim", "csim-sanitize"])
def test_c_simulation_agrees_with_the_reference(build, target):
    need(["make", "g++"], ["hls4ml"])
    done = make(target, build)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(r"csim: (\d+) cases agree with hillinfer_core.reference, 0 do not", done.stdout)
    assert told
    assert int(told[1]) >= 180


def test_c_simulation_tells_one_wrong_bit(build):
    need(["make", "g++"], ["hls4ml"])
    built = make("csim", build)
    assert built.returncode == 0, built.stderr
    vectors = bytearray((build / "vectors.bin").read_bytes())
    vectors[-1] ^= 1  # of the last summary
    (build / "wrong.bin").write_bytes(vectors)
    done = subprocess.run([build / "csim", build / "wrong.bin"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "summaries" in done.stderr
    assert ", 1 do not" in done.stdout


def test_rtl_simulation_agrees_with_the_reference(build):
    need(["make", "iverilog"], ["cocotb"])
    done = make("rtl-sim", build)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^rtl-sim: .*: agrees$", done.stdout, re.MULTILINE)) == 5


def test_the_budget_of_cost_is_labelled_and_one_width_fits(monkeypatch):
    monkeypatch.syspath_prepend(str(HLS / "rtl"))
    import cost

    yosys = cost.find_yosys()
    if yosys is None:
        need(["yosys"])
    cells = cost.count_cells(yosys, 8, 8, 1, True)
    assert 1 <= cells["DSP"] <= 4
    assert 0 < cells["LUT"] < cost.BUDGET["LUT"]
    table = (ROOT / "docs" / "hls-cost.md").read_text()
    assert cost.LABEL in table


def test_without_vitis_the_bitstream_says_what_is_missing(build):
    need(["make"])
    if shutil.which("v++"):
        pytest.skip("Vitis is installed here")
    done = make("xclbin", build, PLATFORM="xilinx_u2_gen3x4_xdma_gc_2_202110_1")
    assert done.returncode != 0
    assert "install AMD Vitis" in done.stderr
