"""Drives and cards that come and go while the daemon runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .inventory import scan
from .model import Inventory, Namespace, SmartSsd
from .udev import Change, Monitor

READY_WITHIN_S = 60.0
"""Longest wait for a card whose driver is bound to say that it is ready and for its drive to show, and for
udev to examine a drive. Our choice: we know of no vendor document that gives a time."""

POLL_S = 0.5
"""Between two looks at what is not ready; no event tells when a card is. Our choice."""

_GONE = frozenset({"remove", "unbind"})
_NEW = {"pci": frozenset({"bind"}), "block": frozenset({"add", "change"})}
"""What is worth a look. For a PCI function not ``add``: that comes before its driver has probed."""

Device = Namespace | SmartSsd
Identity = tuple[object, ...]


@dataclass(frozen=True)
class Appeared:
    """A namespace is there, or a card with a bound driver; look at ``usable`` and ``problems``."""

    device: Device


@dataclass(frozen=True)
class Disappeared:
    """A device that appeared is gone, or was gone for a moment: what was open on it is not valid any more."""

    device: Device


Event = Appeared | Disappeared


class Tracker:
    """Turns what udev says into events. Pure: ``look`` and ``clock`` (seconds) are its only sources.

    A device that goes and comes back at once disappears and appears again, even if both lie between two
    looks. Only another device is news: not a mount or a signature on one that is known, nor a card that was
    not ready in time and is now, until its driver is bound again.
    """

    def __init__(
        self,
        look: Callable[[], Inventory],
        *,
        ready_within_s: float = READY_WITHIN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look = look
        self._ready_within_s = ready_within_s
        self._clock = clock
        self._known: dict[Identity, Device] = {}
        self._waiting: dict[Identity, float] = {}

    @property
    def waiting(self) -> bool:
        """Whether a device is not ready yet, so that the machine should be looked at again soon."""
        return bool(self._waiting)

    def handle(self, changes: Iterable[Change] | None) -> list[Event]:
        """Return what ``changes``, in their order, mean; for None, what a look at the machine shows.

        Blocks while the machine is looked at, which is done at most once.
        """
        if changes is None:
            return self._refresh()
        events: list[Event] = []
        stale = False
        for change in changes:
            if change.subsystem == "block" and not change.path.name.startswith("nvme"):
                continue
            if change.action in _GONE:
                events += self._drop([d for d in self._known.values() if _rests_on(d, change.path)])
            stale = stale or change.action in _GONE or change.action in _NEW[change.subsystem]
        return events + self._refresh() if stale else events

    def _refresh(self) -> list[Event]:
        found, now = self._look(), self._clock()
        here: dict[Identity, Device] = {}
        waiting: dict[Identity, float] = {}
        devices: list[Device] = [*found.namespaces, *(card for card in found.cards if card.fpga.driver)]
        for device in devices:
            deadline = self._waiting.get(device.identity, now + self._ready_within_s)
            if device.identity in self._known or _settled(device) or now >= deadline:
                here[device.identity] = device
            else:
                waiting[device.identity] = deadline
        self._waiting = waiting
        events = self._drop([device for identity, device in self._known.items() if identity not in here])
        events += [Appeared(device) for identity, device in here.items() if identity not in self._known]
        self._known |= here
        return events

    def _drop(self, gone: list[Device]) -> list[Event]:
        # Cards first: they rest on their namespace.
        gone.sort(key=lambda device: isinstance(device, Namespace))
        return [Disappeared(self._known.pop(device.identity)) for device in gone]


async def watch(*, ready_within_s: float = READY_WITHIN_S) -> AsyncGenerator[Event, None]:
    """Yield what is there as :class:`Appeared`, then what comes and goes, for ever.

    Needs a running udevd for anything after the first look. The machine is looked at in another thread, as a
    driver may take its time to answer; the event loop is never blocked. Raises
    :class:`~hillinferd.discovery.udev.UdevUnavailable`. Close the generator (``aclosing``) to stop.
    """
    # Before the first look, so that nothing between the two is missed.
    monitor = Monitor()
    tracker = Tracker(scan, ready_within_s=ready_within_s)
    changes: list[Change] | None = None
    while True:
        for event in await asyncio.to_thread(tracker.handle, changes):
            yield event
        woken = await _readable(monitor.fileno(), POLL_S if tracker.waiting else None)
        changes = monitor.pending() if woken else None


async def _readable(descriptor: int, within_s: float | None) -> bool:
    loop, woken = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, woken.set)
    try:
        async with asyncio.timeout(within_s):
            await woken.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)
    return True


def _rests_on(device: Device, path: Path) -> bool:
    if isinstance(device, Namespace):
        return any(place.is_relative_to(path) for place in (device.path, device.controller) if place)
    return any(place.is_relative_to(path) for place in device.fpga.paths) or (
        device.namespace is not None and _rests_on(device.namespace, path)
    )


def _settled(device: Device) -> bool:
    if isinstance(device, Namespace):
        # Till udev has examined it, nobody knows what is on it.
        return device.signature is not None
    return device.fpga.ready is True and device.namespace is not None and _settled(device.namespace)
