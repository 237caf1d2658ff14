"""The pyxrt of a worker process: one fake card, which outlives it in files of the directory $FAKE_CARD.

``faults.json`` holds faults of :class:`fake_pyxrt.FakeCard`, and is read again and again; ``loaded`` the uuid
and the kernels of the card's bitstream; ``loads`` one line for each that was loaded; ``runs-PID`` how many
runs of the kernel a process started; ``violations`` what was done to the card that one must not do.
"""

# ruff: noqa: F403, N801

import atexit
import json
import os
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import fake_pyxrt
from fake_pyxrt import *

from hillinferd.driver.xrt import launch, scan

STATE = Path(os.environ["FAKE_CARD"])
BDF = "0000:65:00.1"

launch.DEADLINE_S = 0.2
scan.STREAM_BYTES = 64 << 10


@dataclass
class _Card(fake_pyxrt.FakeCard):
    def alive(self) -> None:
        faults = json.loads((STATE / "faults.json").read_text())
        self.hang = faults.get("hang", False)
        self.miscomputing = {UUID(text) for text in faults.get("miscomputing", [])}
        super().alive()

    def note(self) -> None:
        (STATE / f"runs-{os.getpid()}").write_text(str(self.runs))
        if self.violations:
            with (STATE / "violations").open("a") as file:
                file.writelines(f"{text}\n" for text in self.violations)
            self.violations.clear()


class device(fake_pyxrt.device):
    def load_xclbin(self, what: str) -> fake_pyxrt.uuid:
        loaded = super().load_xclbin(what)
        (STATE / "loaded").write_text(f"{self.card.loaded} {' '.join(self.card.kernels)}")
        with (STATE / "loads").open("a") as file:
            file.write(f"{self.card.loaded}\n")
        return loaded


class run(fake_pyxrt.run):
    def start(self) -> None:
        super().start()
        self.card.note()


def _plug() -> None:
    card = fake_pyxrt.CARDS[BDF] = _Card()
    if (STATE / "loaded").exists():
        own, *kernels = (STATE / "loaded").read_text().split()
        card.loaded, card.kernels = UUID(own), tuple(kernels)
    atexit.register(card.note)


_plug()
