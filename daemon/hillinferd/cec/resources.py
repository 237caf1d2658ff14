"""What a kernel takes of the FPGA: yosys estimates of the arithmetic, not of the kernel."""

from __future__ import annotations

from hillinfer_core.layout import Precision

from .cards import Resources

# docs/hls-cost.md: hls/rtl/dot_lanes.sv at one 64-byte beat a cycle (16 token lanes), yosys 0.70,
# synth_xilinx -family xcup; INT8 multiplies in DSP, INT4 in LUT. By the multipliers of a unit.
_UNIT = {
    Precision.int8: (64, Resources(lut=1859, dsp=64, ff=2468, bram36=0, uram=0)),
    Precision.int4: (128, Resources(lut=9571, dsp=0, ff=3797, bram36=0, uram=0)),
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
    multipliers, unit = _UNIT[precision]

    def share(of_unit: int) -> int:
        return -(-of_unit * lanes // multipliers)

    return Resources(
        lut=share(unit.lut),
        dsp=share(unit.dsp),
        ff=share(unit.ff),
        bram36=share(unit.bram36),
        uram=heads_in_flight * uram_of_head(tokens),
    )


def uram_of_head(tokens: int) -> int:
    """Return the URAM that INT32 scores of ``tokens`` tokens take, 16 of them in a word: 16 for 131,072."""
    words = -(-tokens // 16)
    return 64 // _URAM_BYTES_WIDE * -(-words // _URAM_DEPTH)
