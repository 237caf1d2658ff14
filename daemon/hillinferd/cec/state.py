"""What CEC remembers of a card: the bitstreams that were good, with copies of their files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hillinfer_core.errors import BadBitstream, ConfigError

from .catalogue import Entry, entry_of, table_of

log = logging.getLogger(__name__)

VERSION = 1
STATE_FILE = "state.json"
LARGEST_STATE = 1 << 20
"""Bytes of the largest state file that is read. Our choice."""

# What a file that is not ours can raise on its way to being a State.
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError, ConfigError)


@dataclass(frozen=True)
class State:
    """``good`` passed its self-test last and is what the card should have; ``previous`` did before it."""

    good: Entry | None = None
    previous: Entry | None = None


class StateDirectory:
    """A card's directory: the state, and ``SHA256.xclbin`` for each bitstream in it.

    Copies, so that the last good bitstream is there when the catalogue's file has been replaced. Files are
    changed by renaming: after a crash there is the old state or the new. ``OSError`` passes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self) -> State:
        """Return the state; one that is damaged counts as none, with a warning."""
        path = self.directory / STATE_FILE
        try:
            with path.open("rb") as file:
                return _parse(file.read(LARGEST_STATE))
        except FileNotFoundError:
            return State()
        except (*_DAMAGE, OSError) as error:
            log.warning(
                "%s is damaged (%s): no bitstream counts as good; load one with hillinferctl cec load",
                path,
                error,
            )
            return State()

    def write(self, state: State) -> None:
        """Replace the state, and delete copies that are not in it."""
        body = {
            "version": VERSION,
            "good": table_of(state.good) if state.good else None,
            "previous": table_of(state.previous) if state.previous else None,
        }
        text = json.dumps({**body, "checksum": _checksum(body)}, indent=2) + "\n"
        _replace(self.directory / STATE_FILE, text.encode())
        kept = {self.copy_of(entry) for entry in (state.good, state.previous) if entry}
        for path in self.directory.glob("*.xclbin"):
            if path not in kept:
                path.unlink()

    def copy_of(self, entry: Entry) -> Path:
        """Return where the copy of the entry's file is, or would be."""
        return self.directory / f"{entry.sha256}.xclbin"

    def keep(self, source: Path, entry: Entry) -> Path:
        """Copy the entry's file, ``source``, and return the copy; :class:`BadBitstream` if it has changed."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        copy = self.copy_of(entry)
        part = copy.with_suffix(".part")
        shutil.copyfile(source, part)
        if hashlib.sha256(part.read_bytes()).hexdigest() != entry.sha256:
            part.unlink()
            raise BadBitstream(f"{source} changed while it was read; try again")
        os.replace(part, copy)
        return copy

    def forget(self, entry: Entry) -> None:
        """Delete the copy of the entry's file."""
        self.copy_of(entry).unlink(missing_ok=True)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _parse(data: bytes) -> State:
    document = json.loads(data)
    checksum = document.pop("checksum")
    if checksum != _checksum(document):
        raise ValueError("its checksum is wrong")
    if document["version"] != VERSION:
        raise ValueError(f"version {document['version']}")
    return State(*(_entry(document[key], key) for key in ("good", "previous")))


def _entry(table: Mapping[str, Any] | None, where: str) -> Entry | None:
    return entry_of(table, where) if table is not None else None


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
