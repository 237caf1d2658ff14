"""Devices whose speed :mod:`.pacing` can give to a pool on something faster.

None of these figures was measured by us on a SmartSSD: they are the vendor's (documents, product brief,
published measurements), and the project has never run on one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hillinfer_core.errors import ConfigError
from hillinfer_core.layout import PAGE


@dataclass(frozen=True)
class Profile:
    """Speeds in bytes a second, times in seconds, sizes in bytes; 0 means "no limit".

    ``nand_read`` and ``nand_write`` of large transfers; ``read_iops`` random reads of ``smallest`` bytes,
    which is also what a smaller read costs; ``latency`` of a command, beside its transfer; ``command`` the
    largest one, a longer range is several; ``card_dram`` what the card's memory gives the kernel, and
    ``kernel`` the evaluation keys that the kernel could take; ``host_read`` (card to host) and
    ``host_write`` the link; ``p2p`` from NAND to the card's memory. Reads, appends and P2P share the NAND.
    """

    name: str
    nand_read: float = 0
    nand_write: float = 0
    read_iops: float = 0
    smallest: int = PAGE
    latency: float = 0
    command: int = 0
    card_dram: float = 0
    kernel: float = 0
    host_read: float = 0
    host_write: float = 0
    p2p: float = 0

    @property
    def scan(self) -> float:
        """Evaluation keys scanned a second from the card's memory: the slower of memory and kernel."""
        limits = [rate for rate in (self.card_dram, self.kernel) if rate]
        return min(limits, default=0)


NONE = Profile("none")
"""As fast as it goes."""

SMARTSSD = Profile(
    "smartssd",
    # Samsung's product brief: 3300/2000 MB/s sequential, about 750K random reads of 4 KiB, commands of at
    # most 128 KiB.
    nand_read=3300e6,
    nand_write=2000e6,
    read_iops=750e3,
    smallest=4096,
    command=128 << 10,
    # One synchronous 4 KiB P2P read at a time gives 0.05 GB/s: 4096 / 0.05e9 = 82 us, 2 of them transfer.
    latency=80e-6,
    # The vendor's kernel test measured 15.4 of the 19.2 GB/s of one DDR4 channel.
    card_dram=15.4e9,
    # One 64-byte beat a cycle at the shell's default clock of 300 MHz; the achieved clock is known only
    # after place and route.
    kernel=64 * 300e6,
    # DMA measured over PCIe Gen3 x4.
    host_read=3.31e9,
    host_write=3.42e9,
    # 32 asynchronous streams: 3.13 to 3.21 GB/s.
    p2p=3.13e9,
)
"""Samsung SmartSSD with Xilinx KU15P; every figure is the vendor's."""


SMARTSSD_THIRD = replace(
    SMARTSSD,
    name="smartssd_third",
    **{
        rate: getattr(SMARTSSD, rate) / 3
        for rate in (
            "nand_read", "nand_write", "read_iops", "card_dram", "kernel", "host_read", "host_write", "p2p",
        )
    },
    latency=SMARTSSD.latency * 3,
)  # fmt: skip
"""A third as fast: for trials of what adapts to a drive that becomes slower."""


def profile(name: str) -> Profile:
    """Return the profile called ``name``, or raise :class:`ConfigError`."""
    for known in (NONE, SMARTSSD, SMARTSSD_THIRD):
        if known.name == name:
            return known
    raise ConfigError(f"profile: {name!r} is not known; use none or smartssd")
