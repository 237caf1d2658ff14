"""What a kernel takes of the FPGA: yosys estimates of the arithmetic, not of the kernel."""

from __future__ import annotations

from hillinfer_core.layout import Precision

from .cards import Resources

UNIT_LANES = 16
"""Multipliers of the unit that was synthesised: a 16-element dot product with its accumulator."""

# yosys, synth_xilinx -family xcup. INT4 multiplies in LUT; its flip-flops were not noted.
_UNIT = {
    Precision.int8: Resources(lut=315, dsp=16, ff=817, bram36=0, uram=0),
    Precision.int4: Resources(lut=434, dsp=0, ff=None, bram36=0, uram=0),
}

# A block is 4,096 words of 72 bits, of which 64 hold data.
_URAM_BYTES_WIDE, _URAM_DEPTH = 8, 4096

BASIS = "yosys estimate of the arithmetic, not of the kernel"
LEAVES_OUT = (
    "AXI masters, histogram, threshold, compaction, checksum, control, the query buffer and the shell; "
    "clock and routing are unknown until place and route"
)


def estimate(precision: Precision, lanes: int, heads_in_flight: int, tokens: int) -> Resources:
    """Return what ``lanes`` multipliers take, with scores of ``heads_in_flight`` heads of ``tokens`` tokens.

    An INT16 query is counted as INT8: a DSP48E2 multiplies 27 by 18 bits, so the number of DSP stays; its
    wider sums take more LUT and FF than said.
    """
    unit, units = _UNIT[precision], -(-lanes // UNIT_LANES)
    return Resources(
        lut=units * unit.lut,
        dsp=units * unit.dsp,
        ff=None if unit.ff is None else units * unit.ff,
        bram36=units * unit.bram36,
        uram=heads_in_flight * uram_of_head(tokens),
    )


def uram_of_head(tokens: int) -> int:
    """Return the URAM that INT32 scores of ``tokens`` tokens take, 16 of them in a word: 16 for 131,072."""
    words = -(-tokens // 16)
    return 64 // _URAM_BYTES_WIDE * -(-words // _URAM_DEPTH)
