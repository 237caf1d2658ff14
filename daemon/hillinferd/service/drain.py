"""Whether the daemon takes in anything new."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from hillinfer_core.errors import Draining

from ..logs import get_logger

log = get_logger(__name__)


class Drain:
    """While it is on, new sessions and contexts are refused and what is open goes on. One event loop."""

    def __init__(self) -> None:
        self._on = False
        self._changed = asyncio.Event()

    @property
    def on(self) -> bool:
        """Whether the daemon drains."""
        return self._on

    def set(self, on: bool) -> None:
        """Begin to drain, or take in everything again; harmless if that is so already."""
        if on != self._on:
            log.info("draining: no new sessions and contexts" if on else "no longer draining")
            self._on = on
            self._changed.set()

    def check(self) -> None:
        """Raise :class:`Draining` while it is on."""
        if self._on:
            raise Draining(
                "the daemon is draining and takes in no new sessions and contexts; try again when it is "
                "back, or ask an administrator for hillinferctl undrain"
            )

    async def changes(self) -> AsyncIterator[bool]:
        """Yield :attr:`on` now and after each change, without end; for one reader."""
        while True:
            self._changed.clear()
            yield self._on
            await self._changed.wait()
