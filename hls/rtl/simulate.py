"""Simulate dot_lanes with Icarus Verilog and cocotb, at each precision, against the shared vectors."""

from __future__ import annotations

import argparse
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

HERE = Path(__file__).parent
CONFIGURATIONS = [(8, 8, 16), (4, 8, 16), (8, 16, 16), (8, 8, 4), (4, 8, 1)]  # key bits, query bits, lanes


def simulate(build: Path, key_bits: int, query_bits: int, lanes: int) -> bool:
    """Build and run one configuration in ``build``; return whether tests ran and all passed."""
    from cocotb_tools.runner import get_runner

    runner = get_runner("icarus")
    runner.build(
        sources=[HERE / "dot_lanes.sv"],
        hdl_toplevel="dot_lanes",
        parameters={"KEY_BITS": key_bits, "QUERY_BITS": query_bits, "LANES": lanes},
        build_args=["-g2012"],
        timescale=("1ns", "1ps"),
        build_dir=build,
        always=True,
    )
    results = runner.test(
        hdl_toplevel="dot_lanes",
        test_module="test_dot_lanes",
        test_dir=HERE,
        build_dir=build,
        results_xml=str(build.resolve() / "results.xml"),
        extra_env={
            "HILLINFER_KEY_BITS": str(key_bits),
            "HILLINFER_QUERY_BITS": str(query_bits),
            "HILLINFER_LANES": str(lanes),
        },
    )
    tree = ET.parse(results)
    tests, failures = list(tree.iter("testcase")), list(tree.iter("failure")) + list(tree.iter("error"))
    return bool(tests) and not failures


def main() -> int:
    """Simulate all configurations; return 1 if one fails, 2 if a tool is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=Path("build/rtl"), help="folder for what is built")
    folder = parser.parse_args().build
    if shutil.which("iverilog") is None:
        print("iverilog is not on PATH: install your distribution's iverilog", file=sys.stderr)
        return 2
    sys.path.insert(0, str(HERE))
    failed = 0
    for key_bits, query_bits, lanes in CONFIGURATIONS:
        passed = simulate(folder / f"k{key_bits}q{query_bits}l{lanes}", key_bits, query_bits, lanes)
        failed += not passed
        told = "agrees" if passed else "FAILED"
        print(f"rtl-sim: INT{key_bits} keys, INT{query_bits} query, {lanes} lanes: {told}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
