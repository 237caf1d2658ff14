"""The card itself: opening it, its bitstream, its kernels, whether it is well."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from uuid import UUID

from hillinfer_core.errors import BadBitstream, DeviceUnavailable

from ...cec.catalogue import check_shell
from ...cec.configurations import SHIPPED
from ...cec.xclbin import Xclbin, read_xclbin
from .runtime import explained, load_pyxrt

SYSFS = Path("/sys/bus/pci/devices")

NOT_FLASHED = "xilinx_u2"
"""Name that a card has before its shell is flashed (vendor's documents)."""


class Card:
    """The FPGA whose user function has the PCI address ``bdf``.

    Raises :class:`DeviceUnavailable` with its remedy if XRT is not there, or the card cannot be opened or has
    not been flashed. Calls block; one thread at a time.
    """

    def __init__(self, bdf: str) -> None:
        if not bdf:
            raise DeviceUnavailable(
                "no card is named: set the PCI address of its user function (xbutil examine lists it)"
            )
        self.bdf = bdf
        self.xrt = load_pyxrt()
        with explained(bdf, "opening the card"):
            self.device: Any = self.xrt.device(bdf)
            name = self._info("name")
        if name == NOT_FLASHED:
            raise DeviceUnavailable(
                f"card {bdf} shows only {name}: its shell is not flashed; run `xbmgmt program --base -d BDF` "
                "with the address of its management function, then power the machine off and on "
                "(docs/smartssd.md)"
            )

    def health(self) -> None:
        """Raise :class:`DeviceUnavailable` if the card does not answer or is off."""
        with explained(self.bdf, "asking the card"):
            offline = self._info("offline")
        if offline.lower() in ("1", "true"):
            raise DeviceUnavailable(
                f"card {self.bdf} is offline: hot (100 C turns it off until a cold restart), or being reset"
            )

    def interface_uuids(self) -> list[UUID]:
        """Return the shells that a bitstream may be built for: what sysfs lists, and what XRT says."""
        with explained(self.bdf, "asking for its shell"):
            texts = [self._info("interface_uuid")]
        # Other versions of the driver lack the file; XRT's answer is enough for most shells.
        with contextlib.suppress(OSError):
            texts += (SYSFS / self.bdf / "interface_uuids").read_text().split()
        return list(dict.fromkeys(UUID(text) for text in texts if _is_uuid(text)))

    def loaded_uuid(self) -> UUID | None:
        """Return the uuid of the bitstream that the card says is loaded, or None."""
        with explained(self.bdf, "asking for its bitstream"):
            text = self.device.get_xclbin_uuid().to_string()
        return UUID(text) if _is_uuid(text) else None

    def load(self, path: Path) -> Xclbin:
        """Make the xclbin at ``path`` the one that is loaded; does nothing if it is.

        Raises :class:`BadBitstream`, before the card is touched, if the file is malformed or built for
        another shell or emulation, and after it if the card then reports another uuid;
        :class:`DeviceUnavailable` if loading fails.
        """
        xclbin = read_xclbin(path)
        check_shell(xclbin, path.name, self.interface_uuids())
        if self.loaded_uuid() != xclbin.uuid:
            with explained(self.bdf, f"loading {path.name}"):
                self.device.load_xclbin(str(path))
        found = self.loaded_uuid()
        if found != xclbin.uuid:
            raise BadBitstream(
                f"card {self.bdf} reports bitstream {found} after loading {path.name}, "
                f"which is {xclbin.uuid}; load it again, and reset the card if that does not help"
            )
        return xclbin

    def kernels(self, xclbin: Xclbin) -> dict[str, Any]:
        """Return by name the evaluation kernels of the loaded ``xclbin``."""
        names = {instance.partition(":")[0] for instance in xclbin.kernels}
        found = {}
        for name in [kernel.name for kernel in SHIPPED if kernel.name in names]:
            with explained(self.bdf, f"opening the kernel {name}"):
                found[name] = self.xrt.kernel(self.device, self.device.get_xclbin_uuid(), name)
        return found

    def group(self, kernel: Any) -> int:
        """Return the memory group of the kernel's keys: the one DDR bank of the card, for all buffers."""
        with explained(self.bdf, "asking for the kernel's memory"):
            return int(kernel.group_id(0))

    def _info(self, what: str) -> str:
        return str(self.device.get_info(getattr(self.xrt.xrt_info_device, what)))


def _is_uuid(text: str) -> bool:
    try:
        return UUID(text).int != 0
    except ValueError:
        return False
