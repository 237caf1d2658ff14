"""What is known of the cards that the evaluation kernel may run on.

None of these figures was measured by us: they are the vendor's documents and published dumps, and every plan
that is made of them says so. Each constant names its source.
"""

from __future__ import annotations

from dataclasses import dataclass

from hillinfer_core.errors import InvalidInput


@dataclass(frozen=True)
class Resources:
    """FPGA resources. BRAM36 and URAM are blocks."""

    lut: int
    dsp: int
    ff: int
    bram36: int
    uram: int


@dataclass(frozen=True)
class Card:
    """A card: bytes, bytes a second, Hz. ``budget`` is what the shell leaves a kernel."""

    name: str
    title: str
    clock_hz: int
    dram_bytes: int
    dram_reserve_bytes: int
    dram_peak: float
    dram_rate: float
    nand_bytes: int
    nand_rate: float
    link_to_card: float
    link_to_host: float
    budget: Resources


SMARTSSD = Card(
    name="smartssd",
    title="Samsung SmartSSD, KU15P -2LE, DFX shell xilinx_u2_gen3x4_xdma_gc_2_202110_1",
    # Vendor's default; the clock that a build achieves is known only after place and route.
    clock_hz=300_000_000,
    # Vendor: "4 GB". Read as powers of ten, the smaller reading.
    dram_bytes=4_000_000_000,
    # Our choice: queries, results and the two halves of the buffer that NAND streams into.
    dram_reserve_bytes=64 << 20,
    # Vendor: one channel of DDR4-2400 with ECC.
    dram_peak=19.2e9,
    # Vendor's kernel bandwidth test.
    dram_rate=15.4e9,
    # Vendor: capacity of the drive.
    nand_bytes=3_840_000_000_000,
    # Vendor's P2P test, 32 asynchronous streams: the lower end of 3.13 to 3.21 GB/s. One synchronous stream
    # of 128 KiB commands reaches 1.21 only.
    nand_rate=3.13e9,
    # Vendor's DMA test over PCIe Gen3 x4: writes to the card, reads from it.
    link_to_card=3.42e9,
    link_to_host=3.31e9,
    # Vendor's resource table of that shell, less its own DDR controller (21K LUT, 25K FF, 26 BRAM36, 3 DSP).
    budget=Resources(lut=310_000, dsp=1338, ff=655_000, bram36=620, uram=104),
)

CARDS = {card.name: card for card in (SMARTSSD,)}


def card_named(name: str) -> Card:
    """Return the card called ``name``, or raise :class:`InvalidInput` that lists those known."""
    if name not in CARDS:
        raise InvalidInput(f"{name!r} is not a known card; use {', '.join(CARDS)}")
    return CARDS[name]
