"""Reading the configuration again while the daemon runs: what of a change applies at once, what does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import config
from .config_limits import LIMIT_KEYS

LIVE = frozenset({"log_level", "exit_when_idle", *(key.name for key in LIMIT_KEYS)})
"""Keys whose change applies at once; workers that run keep their log level until they are replaced."""


@dataclass(frozen=True)
class Change:
    """What a reload found: the configuration now, the changed keys that apply, those that need a restart."""

    settings: config.Config
    applied: list[str]
    restart: list[str]


class Reloader:
    """Compares the file, under the same ``overrides``, with what the daemon began with; ``given`` is that.

    Keys are compared as they are written: a default that follows the disk's free space is no change.
    """

    def __init__(self, file: Path | None, overrides: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        self.file = file
        self._overrides = overrides
        self._running = dict(given)

    def reload(self) -> Change:
        """Read the file again; blocks for it.

        Raises :class:`~hillinfer_core.errors.ConfigError`, and everything stays as it was.
        """
        given = config.read(self.file, self._overrides)
        settings = config.build(given)
        changed = {name for name in {*given, *self._running} if given.get(name) != self._running.get(name)}
        applied = sorted(changed & LIVE)
        # What needs a restart is told with every reload until there is one.
        for name in applied:
            self._running.pop(name, None)
            if name in given:
                self._running[name] = given[name]
        return Change(settings, applied, sorted(changed - LIVE))
