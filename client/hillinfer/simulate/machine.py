"""Every constant of the model, with its range and its source. Frozen before results are compared."""

from __future__ import annotations

from dataclasses import dataclass

from hillinfer_core.errors import InvalidInput

GB = 1e9


@dataclass(frozen=True)
class Constant:
    """A figure of the machine: `worst` and `best` for HillInfer's step time where it is uncertain."""

    name: str
    nominal: float
    unit: str
    source: str
    worst: float | None = None
    best: float | None = None


_SMARTSSD = "vendor documents and published dumps of the SmartSSD"
_UNKNOWN = "unknown; our choice"

CONSTANTS = (
    Constant("gpu_memory", 24 * 2**30, "B", "RTX 4090, public specifications"),
    Constant("gpu_reserve", 2 * 2**30, "B", f"activations and runtime: {_UNKNOWN}"),
    Constant("gpu_bandwidth", 1008 * GB, "B/s", "RTX 4090, public specifications"),
    Constant("gpu_flops", 165.2e12, "FLOP/s", "RTX 4090, public specifications: dense FP16, FP32 sums"),
    Constant("gpu_efficiency", 0.7, "1", f"share of both peaks reached: {_UNKNOWN}", 0.4, 0.9),
    Constant("gpu_link", 25 * GB, "B/s", "PCIe 4.0 x16 carries 31.5 GB/s; 80 % is our choice",
             16 * GB, 28 * GB),
    Constant("host_scan", 40 * GB, "B/s", f"scoring on the host, of key bytes: {_UNKNOWN}; 32-35 GB/s "
             "is this project's own two-core machine (docs/kernel.md)", 20 * GB, 100 * GB),
    Constant("host_memory", 48 * GB, "B", "64 GB in the paper's machine; a quarter left is our choice"),
    Constant("ssd_read", 6.85 * GB, "B/s", "the paper's host SSD"),
    Constant("ssd_iops", 1.0e6, "1/s", f"of the paper's host SSD: {_UNKNOWN}"),
    Constant("ssd_write", 5.0 * GB, "B/s", f"of the paper's host SSD: {_UNKNOWN}"),
    Constant("drive_read", 3.31 * GB, "B/s", f"{_SMARTSSD}: measured DMA to the host, PCIe 3 x4"),
    Constant("drive_write", 2.0 * GB, "B/s", f"{_SMARTSSD}: sequential write"),
    Constant("drive_iops", 750e3, "1/s", f"{_SMARTSSD}: 4 KiB random reads"),
    Constant("p2p_read", 3.13 * GB, "B/s", f"{_SMARTSSD}: NVMe to FPGA DRAM, 32 streams",
             2.36 * GB, 3.21 * GB),
    Constant("fpga_memory", 4 * 2**30, "B", f"{_SMARTSSD}"),
    Constant("fpga_memory_rate", 15.4 * GB, "B/s", f"{_SMARTSSD}: the vendor's kernel test"),
    Constant("kernel_clock", 300e6, "Hz", f"{_SMARTSSD}: the default; what is achieved is {_UNKNOWN}",
             150e6, 300e6),
    Constant("kernel_width", 64, "B/cycle", "the kernel of hls/: one 512-bit word a cycle"),
    Constant("kernel_start", 100e-6, "s", f"to start a kernel run: {_UNKNOWN}", 300e-6, 30e-6),
    Constant("request", 340e-6, "s", "a turn of a gRPC stream, measured by this project on two cores; best: "
             "the aim for the ring", 450e-6, 100e-6),
    Constant("rows_per_read", 1, "1", f"adjacent missing rows read at once: {_UNKNOWN}", 1, 8),
    Constant("step_overlap", 0.81, "1", "share of a step's tokens that the step before had: SolidAttention "
             "(FAST'26)", 0.65, 0.95),
    Constant("prediction_loss", 0.06, "1", "attention that next_layer lacks: 0.005 to 0.12 by layer, this "
             "project's bundled model", 0.12, 0.005),
    Constant("abstract_share", 0.13, "1", "of a chunk's key bytes: LeoAM"),
    Constant("chunk_waste", 2.0, "1", f"tokens read for each wanted one, by whole chunks: {_UNKNOWN}",
             1.0, 4.0),
)  # fmt: skip


class Machine:
    """The constants as attributes. `extreme` takes all uncertain ones at their `worst` or `best`."""

    def __init__(self, extreme: str = "nominal", /, **changed: float) -> None:
        self._values = {each.name: each.nominal for each in CONSTANTS}
        for each in CONSTANTS:
            value = getattr(each, extreme)
            if value is not None:
                self._values[each.name] = value
        unknown = changed.keys() - self._values.keys()
        if unknown:
            raise KeyError(f"no such constant: {', '.join(sorted(unknown))}")
        self._values.update(changed)

    def __getattr__(self, name: str) -> float:
        try:
            return self.__dict__["_values"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(name) from None

    def shared_by(self, applications: int) -> Machine:
        """Return what each of so many applications has: its part of the card's and the host's memory."""
        mine = Machine()
        mine._values = dict(self._values)
        for name in ("fpga_memory", "host_memory"):
            mine._values[name] /= applications
        return mine

    @property
    def kernel_rate(self) -> float:
        """Bytes/s that the FPGA ranks from its own memory."""
        return min(self.fpga_memory_rate, self.kernel_clock * self.kernel_width)


GPUS: dict[str, dict[str, float]] = {
    "rtx4090": {},
    # NVIDIA's datasheet of the H100 SXM: 80 GB, 3.35 TB/s, 989.4 dense TFLOPS in BF16, PCIe 5.0 x16; of that
    # as large a share as of PCIe 4.0 above.
    "h100": {"gpu_memory": 80 * GB, "gpu_bandwidth": 3350 * GB, "gpu_flops": 989.4e12, "gpu_link": 50 * GB},
}
"""What other GPUs than the nominal one have instead, by name."""


def machine_with(gpu: str) -> Machine:
    """Return the nominal machine with one of `GPUS` in it. Raises InvalidInput for another name."""
    if gpu not in GPUS:
        raise InvalidInput(f"no such GPU: {gpu}; there are {', '.join(GPUS)}")
    return Machine(**GPUS[gpu])
