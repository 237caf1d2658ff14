"""One look at the machine."""

from __future__ import annotations

from .model import Inventory
from .nvme import Usage, is_namespace, read_namespace
from .pairing import pair
from .udev import Listing, list_devices


def scan() -> Inventory:
    """Return what is there now. Raises :class:`UdevUnavailable`; blocks while sysfs is read."""
    return inventory_of(list_devices(), Usage.read())


def inventory_of(listing: Listing, usage: Usage) -> Inventory:
    """Return the drives and cards among what udev listed."""
    namespaces = tuple(
        read_namespace(path, properties, usage) for path, properties in listing.disks if is_namespace(path)
    )
    return Inventory(namespaces, pair(listing.functions, namespaces))
