"""Every benchmark of docs/, one after another: `make bench`, or some: `make bench ARGS="kernel kvpath"`.

    tools/bench.py [NAME...]

writes what each prints to build/bench/NAME.txt, under the command, date and machine that made it, and plots
beside it. They want the machine to themselves; all of them take two hours or more on two cores.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

DIRECTORY = Path("build/bench")

BENCHMARKS = {
    "kernel": ["kernel"],
    "transport": ["transport --calls 500 --clients 4 --seconds 4"],
    "sharing": ["sharing --rounds 5 --seconds 3 --markdown"],
    "kvpath": [
        "kvpath --plot {directory}/kvpath.svg",
        "kvpath --systems hillinfer,hkm_only,key_abstracts,previous_step_blocks --budget 2% "
        "--budget key_abstracts=20% --budget previous_step_blocks=20%",
        "kvpath --budget 20% --resident 144MiB",
        "kvpath --budget 20% --resident 240MiB --systems hillinfer,hkm_only,host_scoring",
    ],
    "split": ["split --slow cpu@40 --slow drive@40"],
    "decode": [
        "decode --context-tokens 4096 --markdown",
        "decode --context-tokens 16384 --readings 5 --markdown",
        "decode --context-tokens 16384 --systems hillinfer --steps 150 --markdown",
        "decode --context-tokens 65000 --readings 1 --rounds 3 --markdown",
        "decode --context-tokens 65000 --readings 0 --markdown",
        "decode --context-tokens 4096,16384 --batch 1,2,4,8 --systems hillinfer,default:float32 "
        "--readings 0 --markdown --plot {directory}/decode.svg",
    ],
    "growth": ["growth --steps 6 --plot {directory}/decode-growth.svg"],
    "placement": ["placement"],
    "recall": ["recall --untrained --markdown", "recall --coarse --context-tokens 16384 --markdown"],
}
"""Command lines of `hillinfer bench`, by the name of what they measure."""


def main(names: list[str]) -> None:
    """Run the benchmarks ``names``, or all. Exits with 1 for a name that is not one, or where one fails."""
    if unknown := [name for name in names if name not in BENCHMARKS]:
        print(f"no benchmark {', '.join(unknown)}: there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        raise SystemExit(1)
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name in names or BENCHMARKS:
        report = DIRECTORY / f"{name}.txt"
        with report.open("w", buffering=1) as out:
            for line in BENCHMARKS[name]:
                command = ["hillinfer", "bench", *line.format(directory=DIRECTORY).split()]
                print(" ".join(command), flush=True)
                print(f"{' '.join(command)}\n{_machine()}\n", file=out)
                done = subprocess.run(command, executable=hillinfer(), stdout=out, check=False)
                if done.returncode:
                    raise SystemExit(f"it failed with exit code {done.returncode}: see above, and {report}")
                print(file=out)
        print(f"  -> {report}", flush=True)


def hillinfer() -> str:
    """Return the command of this environment."""
    return str(Path(sys.executable).with_name("hillinfer"))


def _machine() -> str:
    names = [
        line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")
    ]
    processor = f"{len(os.sched_getaffinity(0))} processors, {names[0] if names else platform.machine()}"
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {platform.platform()}; {processor}; load average {load}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


if __name__ == "__main__":
    main(sys.argv[1:])
