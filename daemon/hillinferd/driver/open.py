"""Opens the driver that the settings name."""

from __future__ import annotations

from hillinfer_core.errors import ConfigError

from .contract import Driver
from .host import HostDriver
from .settings import DriverSettings


def open_driver(settings: DriverSettings) -> Driver:
    """Return the driver of ``settings.kind``, opened; raises what the driver raises.

    Raises :class:`ConfigError` for a kind that is not known.
    """
    if settings.kind == "host":
        return HostDriver(settings)
    if settings.kind == "xrt":
        # Imported here: its machine need not have XRT.
        from .xrt.driver import XrtDriver

        return XrtDriver(settings)
    raise ConfigError(f"driver: {settings.kind!r} is not known; use host or xrt")
