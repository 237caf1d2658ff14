"""Tells a drive at once that its device was removed, or is there again."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from hillinfer_core.errors import HillInferError

from ..discovery.model import Namespace
from ..discovery.watch import Appeared, Event, watch
from ..logs import get_logger
from .drive import Drive

log = get_logger(__name__)


@dataclass
class _Place:
    """Where a drive is: the node of its pool when last seen, the namespace that is, what was removed."""

    drive: Drive
    node: str
    namespace: tuple[str, str] | None = None
    missing: set[str] = field(default_factory=set)

    def lies_on(self, namespace: Namespace) -> bool:
        """Whether the pool is the namespace or a partition of it."""
        return re.fullmatch(re.escape(namespace.node) + r"(p\d+)?", self.node) is not None


class Hotplug:
    """Follows devices that come and go, for ``drives``, on their event loop.

    A drive is found by the node that its pool's path leads to, links followed, and once it was seen by its
    serial number too: it may come back under another node. A pool that is a file is nobody's. A drive with
    a card is gone while either of the two is.
    """

    def __init__(self, drives: Sequence[Drive]) -> None:
        self._places = [_Place(drive, _node(drive)) for drive in drives]

    async def follow(self, events: Callable[[], AsyncGenerator[Event]] = watch) -> None:
        """Follow ``events`` until cancelled; without udev, drives are only noticed by their errors."""
        try:
            async with aclosing(events()) as coming:
                async for event in coming:
                    self.handle(event)
        except (HillInferError, OSError) as error:
            log.warning("no news of drives that come and go; each is tried again and again", reason=error)

    def handle(self, event: Event) -> None:
        """Tell the drives that ``event`` concerns."""
        device, came = event.device, isinstance(event, Appeared)
        for place in self._places:
            if isinstance(device, Namespace):
                if came:
                    self._came(place, device)
                elif place.lies_on(device):
                    _removed(place, "namespace", f"{device.node}, serial {device.serial}, was removed")
            elif device.fpga.user and device.fpga.user == place.drive.settings.driver.card:
                if came:
                    _returned(place, "card")
                else:
                    _removed(place, "card", f"the card {device.fpga.user} was removed")

    def _came(self, place: _Place, namespace: Namespace) -> None:
        # Namespaces of one drive share its serial number.
        name = (namespace.serial, namespace.node.rpartition("n")[2]) if namespace.serial else None
        if name is not None and name == place.namespace:
            if place.missing and not _lies_on_now(place, namespace):
                place.node = namespace.node + _partition(place.node)
            _returned(place, "namespace")
        elif place.namespace is None and _lies_on_now(place, namespace):
            place.namespace = name
            _returned(place, "namespace")
        elif place.missing == {"namespace"} and _lies_on_now(place, namespace):
            # A stranger where the drive was: its pool may be on it, and is refused if it is another. The
            # drive itself is still waited for.
            _try(place)


def _lies_on_now(place: _Place, namespace: Namespace) -> bool:
    """Look again where the pool's path leads to: links are made anew when a drive comes back."""
    found = _Place(place.drive, _node(place.drive))
    if found.lies_on(namespace):
        place.node = found.node
        return True
    return False


def _node(drive: Drive) -> str:
    return os.path.realpath(drive.settings.driver.path)


def _partition(node: str) -> str:
    found = re.search(r"n\d+(p\d+)$", node)
    return found.group(1) if found else ""


def _removed(place: _Place, what: str, reason: str) -> None:
    place.missing.add(what)
    place.drive.gone(reason)


def _returned(place: _Place, what: str) -> None:
    place.missing.discard(what)
    if not place.missing:
        _try(place)


def _try(place: _Place) -> None:
    path = place.drive.settings.driver.path
    place.drive.back(path if _node(place.drive) == place.node else place.node)
