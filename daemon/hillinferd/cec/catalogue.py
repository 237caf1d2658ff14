"""The catalogue of bitstreams (TOML), and the check of a bitstream against it and against the card."""

from __future__ import annotations

import re
import tomllib
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hillinfer_core.errors import BadBitstream, ConfigError
from hillinfer_core.layout import MAX_HEAD_DIM, Precision

from .configurations import SHIPPED, Configuration
from .xclbin import Xclbin, read_xclbin

VERSION = 1
MANIFEST = "manifest.toml"
"""Name of the manifest in the directory of a catalogue."""

LARGEST_MANIFEST = 1 << 20
"""Bytes of the largest manifest that is read. Our choice."""

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.xclbin")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UUID = re.compile(r"[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """One bitstream: ``file`` lies in the manifest's directory, ``head_dims`` is what it serves."""

    file: str
    sha256: str
    kernel: Configuration
    precision: Precision
    head_dims: tuple[int, ...]
    interface_uuid: uuid.UUID


@dataclass(frozen=True)
class Catalogue:
    """The bitstreams of a directory."""

    directory: Path
    entries: tuple[Entry, ...]

    def find(self, kernel: str, head_dim: int, interface_uuids: Iterable[uuid.UUID]) -> Entry:
        """Return the entry for a kernel and a head dimension that suits one of the card's shells.

        Raises :class:`BadBitstream` that says which of the three nothing has.
        """
        shells = set(interface_uuids)
        named = [entry for entry in self.entries if entry.kernel.name == kernel]
        wide = [entry for entry in named if head_dim in entry.head_dims]
        for entry in wide:
            if entry.interface_uuid in shells:
                return entry
        lacking = (
            f"kernel {kernel}"
            if not named
            else f"head dimension {head_dim}"
            if not wide
            else "the card's shell"
        )
        raise BadBitstream(
            f"{self.directory} has no bitstream for {lacking}; build one with `make -C hls xclbin`"
        )


def read_catalogue(path: Path) -> Catalogue:
    """Read a manifest; raises :class:`ConfigError` that names entry, key, value and what is allowed."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_MANIFEST + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        entries = parse_manifest(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Catalogue(path.parent, entries)


def parse_manifest(data: bytes) -> tuple[Entry, ...]:
    """Return the entries of a manifest's text, or raise :class:`ConfigError` with the first fault."""
    if len(data) > LARGEST_MANIFEST:
        raise ConfigError("more than 1 MiB: not a manifest")
    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"is not TOML: {str(error).splitlines()[0]}") from None
    _keys(document, ("version", "bitstream"), "the manifest")
    if type(document["version"]) is not int or document["version"] != VERSION:
        raise ConfigError(f"version must be {VERSION}, not {document['version']!r:.40}")
    tables = document["bitstream"]
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError("bitstream must be an array of tables: write [[bitstream]]")
    entries = tuple(entry_of(table, f"bitstream {number}") for number, table in enumerate(tables, start=1))
    for key, values in (("file", [e.file for e in entries]), ("sha256", [e.sha256 for e in entries])):
        if len(set(values)) < len(values):
            raise ConfigError(f"two bitstreams have the same {key}")
    return entries


def check_bitstream(xclbin: Xclbin, entry: Entry, interface_uuids: Iterable[uuid.UUID]) -> None:
    """Raise :class:`BadBitstream` unless ``xclbin`` is the one of ``entry`` and the card has its shell.

    ``interface_uuids`` are the card's own, as sysfs lists them.
    """
    if xclbin.sha256 != entry.sha256:
        raise BadBitstream(
            f"{entry.file} has sha256 {xclbin.sha256}, the manifest says {entry.sha256}: it is not that file"
        )
    if xclbin.interface_uuid != entry.interface_uuid:
        raise BadBitstream(
            f"{entry.file} has interface uuid {xclbin.interface_uuid}, "
            f"the manifest says {entry.interface_uuid}"
        )
    # An instance is "kernel:instance".
    if entry.kernel.name not in {name.partition(":")[0] for name in xclbin.kernels}:
        raise BadBitstream(f"{entry.file} has kernels {', '.join(xclbin.kernels)}, not {entry.kernel.name}")
    check_shell(xclbin, entry.file, interface_uuids)


def check_shell(xclbin: Xclbin, file: str, interface_uuids: Iterable[uuid.UUID]) -> None:
    """Raise :class:`BadBitstream` unless ``xclbin``, the file ``file``, is for hardware with such a shell."""
    if not xclbin.for_hardware:
        raise BadBitstream(f"{file} was built for emulation ({xclbin.mode}); build it with TARGET=hw")
    shells = list(interface_uuids)
    if xclbin.interface_uuid not in shells:
        has = ", ".join(map(str, shells)) or "none"
        raise BadBitstream(
            f"{file} was built for shell interface {xclbin.interface_uuid}, the card has {has}; "
            "build it for the card's platform"
        )


def verified(catalogue: Catalogue, entry: Entry, interface_uuids: Iterable[uuid.UUID]) -> Xclbin:
    """Read the entry's file, check it and return what it says of itself; raises :class:`BadBitstream`."""
    xclbin = read_xclbin(catalogue.directory / entry.file)
    check_bitstream(xclbin, entry, interface_uuids)
    return xclbin


def parse_uuid(text: object) -> uuid.UUID:
    """Return a uuid written in lower-case hex, with or without dashes; raises :class:`ConfigError`."""
    if not isinstance(text, str) or not _UUID.fullmatch(text):
        raise ConfigError(f"not a uuid: {text!r:.60}; write 32 lower-case hex digits")
    value = uuid.UUID(text)
    if not value.int:
        raise ConfigError("a uuid of zeros names nothing")
    return value


def entry_of(table: Mapping[str, Any], where: str) -> Entry:
    """Return the entry that ``table`` of a manifest holds; raises :class:`ConfigError` naming ``where``."""
    _keys(table, tuple(_FIELDS), where)
    values: dict[str, Any] = {}
    for key, (convert, allowed) in _FIELDS.items():
        try:
            values[key] = convert(table[key])
        except (ValueError, TypeError, ConfigError):
            raise ConfigError(f"{where}: {key} must be {allowed}, not {table[key]!r:.80}") from None
    entry = Entry(**values)
    if entry.kernel.precision is not entry.precision:
        raise ConfigError(
            f"{where}: {entry.kernel.name} has precision {entry.kernel.precision}, not {entry.precision}"
        )
    return entry


def table_of(entry: Entry) -> dict[str, Any]:
    """Return the table that :func:`entry_of` reads."""
    return {
        "file": entry.file,
        "sha256": entry.sha256,
        "kernel": entry.kernel.name,
        "precision": entry.precision.value,
        "head_dims": list(entry.head_dims),
        "interface_uuid": entry.interface_uuid.hex,
    }


def _keys(table: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in allowed:
            raise ConfigError(f"{where} has the unknown key {key!r:.60}; keys are {', '.join(allowed)}")
    for key in allowed:
        if key not in table:
            raise ConfigError(f"{where} lacks the key {key}")


def _matching(pattern: re.Pattern[str]) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError
        return value

    return convert


def _kernel(value: Any) -> Configuration:
    found = [kernel for kernel in SHIPPED if kernel.name == value]
    if not found:
        raise ValueError
    return found[0]


def _head_dims(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or any(type(dim) is not int for dim in value):
        raise ValueError
    if any(not 8 <= dim <= MAX_HEAD_DIM or dim % 8 for dim in value) or sorted(set(value)) != value:
        raise ValueError
    return tuple(value)


def _precision(value: Any) -> Precision:
    if not isinstance(value, str):
        raise ValueError
    return Precision(value)


_FIELDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "file": (_matching(_FILE), "the plain name of an .xclbin beside the manifest"),
    "sha256": (_matching(_SHA256), "64 lower-case hex digits"),
    "kernel": (_kernel, f"one of {', '.join(kernel.name for kernel in SHIPPED)}"),
    "precision": (_precision, f"one of {', '.join(Precision)}"),
    "head_dims": (_head_dims, f"ascending multiples of 8 up to {MAX_HEAD_DIM}"),
    "interface_uuid": (parse_uuid, "a uuid of 32 lower-case hex digits, not all zero"),
}
