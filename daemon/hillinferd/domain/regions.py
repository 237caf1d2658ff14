"""Regions of a session's arena, checked before anything uses them."""

from __future__ import annotations

from dataclasses import dataclass

from hillinfer_core.errors import InvalidInput
from hillinfer_core.packed import Region

__all__ = ["ArenaSpace", "Region"]


@dataclass(frozen=True)
class ArenaSpace:
    """The size in bytes and the generation of a session's arena; size 0 means that it has none."""

    nbytes: int
    generation: int

    def check(
        self,
        name: str,
        offset: int,
        length: int,
        generation: int,
        *,
        align: int,
        exactly: int | None = None,
        at_least: int = 0,
    ) -> Region:
        """Return the :class:`Region`, or raise :class:`InvalidInput` naming ``name`` and what is wrong.

        ``align`` is what the offset must be a multiple of; ``exactly`` or ``at_least`` bound the length.
        """
        if self.nbytes == 0:
            raise InvalidInput(f"{name}: the session has no arena; attach with arena_bytes above 0")
        if generation != self.generation:
            raise InvalidInput(
                f"{name}: region of arena generation {generation}, but the session's is {self.generation}"
            )
        if offset + length > self.nbytes:
            raise InvalidInput(
                f"{name}: region of {length} bytes at {offset} is outside the arena of {self.nbytes} bytes"
            )
        if offset % align:
            raise InvalidInput(f"{name}: offset {offset} is not a multiple of {align}")
        if exactly is not None and length != exactly:
            raise InvalidInput(
                f"{name}: region has {length} bytes, its shape and dtype need exactly {exactly}"
            )
        if length < at_least:
            raise InvalidInput(f"{name}: region has {length} bytes and needs at least {at_least}")
        return Region(offset, length)
