"""How the worker is told which driver to open."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class DriverSettings:
    """What a driver is opened with; sizes in bytes.

    ``kind`` "host" or "xrt"; ``path`` of the pool: a file, which is made if it does not exist, or a block
    device that has been formatted; ``capacity`` of the pool (a multiple of 4096; for a block device an upper
    bound, 0 for all of it); ``keep`` False for a file that loses its name at once, and with it its content;
    ``key_memory`` that evaluation keys may take (host: DRAM); ``profile`` of the pacing, "none" or
    "smartssd". For xrt only: ``card`` the BDF of the FPGA's user function; ``bitstream`` the xclbin to
    configure it with, or ``configurations`` the directory of a catalogue of such; ``state_dir`` for what is
    remembered of the card.

    ``new_id`` is the UUID that a pool is given if it is new; empty for any.
    """

    kind: str
    path: str
    capacity: int
    keep: bool
    key_memory: int
    profile: str = "none"
    card: str = ""
    bitstream: str = ""
    configurations: str = ""
    state_dir: str = ""
    new_id: str = ""

    def to_json(self) -> str:
        """Return the settings as one argument of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DriverSettings:
        """Return what :meth:`to_json` wrote."""
        return cls(**json.loads(text))
