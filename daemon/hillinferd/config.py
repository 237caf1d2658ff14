"""Configuration: one table of keys, filled from defaults, a TOML file and the command line, in that order."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hillinfer_core.errors import ConfigError, HillInferError
from hillinfer_core.protocol import default_runtime_dir
from hillinfer_core.units import parse_bytes

from .domain.extents import GRANULE
from .driver.block import names_device
from .logs import LEVELS

LARGEST_DEFAULT_POOL = 64 << 30
"""Bytes that the cold pool takes at most unless told otherwise."""

UNLIMITED = 1 << 62
"""Bytes that no quota and no card's memory reaches."""

SMALLEST_POOL = 2 * GRANULE
"""Bytes of a pool that has room for its header and one extent."""


@dataclass(frozen=True)
class DriveConfig:
    """One drive; sizes in bytes. ``pool`` is None for a file without a name."""

    name: str
    driver: str
    pool: Path | None
    pool_capacity: int
    evaluation_keys_dram: int
    profile: str
    card: str
    bitstream: Path | None
    configurations: Path | None


@dataclass(frozen=True)
class Config:
    """What the daemon runs with; sizes in bytes, times in seconds (0: never)."""

    runtime_dir: Path
    state_dir: Path | None
    pool_dir: Path
    arena_limit: int
    session_limit: int
    user_quota: int
    context_quota: int
    request_timeout: int
    exit_when_idle: int
    log_level: str
    drives: tuple[DriveConfig, ...]


@dataclass(frozen=True)
class Key:
    """One configuration key: how a value is converted, what is the default, and what to say about it."""

    name: str
    convert: Callable[[Any], Any]
    default: Callable[[Mapping[str, Any]], Any]
    allowed: str
    help: str


def load(file: Path | None, overrides: Mapping[str, Any]) -> Config:
    """Return the configuration; ``overrides`` maps keys to values from the command line, None for not given.

    Raises :class:`ConfigError` that names the key, the value and what is allowed.
    """
    given = _read(file) if file else {}
    given.update({name: value for name, value in overrides.items() if value is not None})
    tables = given.pop("drive", None)
    if tables is None:
        values = _values((*KEYS, *DRIVE_KEYS), given, {})
        drives = [{key.name: values.pop(key.name) for key in DRIVE_KEYS}]
    else:
        values = _values(KEYS, given, {})
        drives = _drives(tables, values["pool_dir"])
    for drive in drives:
        if drive["bitstream"] and drive["configurations"]:
            raise ConfigError(
                f"drive {drive['name']} has bitstream and configurations; give one of them: hillinferctl cec "
                "load chooses from configurations"
            )
    return Config(**values, drives=tuple(DriveConfig(**drive) for drive in drives))


def _drives(tables: Any, pool_dir: Path) -> list[dict[str, Any]]:
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError("drive: write a [[drive]] table for each drive")
    drives = [
        _values(DRIVE_KEYS, table, {"pool_dir": pool_dir, "index": index})
        for index, table in enumerate(tables)
    ]
    for what in ("name", "pool"):
        if len(drives) > 1 and len({drive[what] for drive in drives} - {None}) < len(drives):
            raise ConfigError(f"{what}: give each [[drive]] a {what} of its own")
    return drives


def _values(keys: Sequence[Key], given: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    names = [key.name for key in keys]
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            raise ConfigError(f"{name} is not a key; use {close[0] if close else ', '.join(names)}")
    values: dict[str, Any] = {}
    # In the table's order: a default may look at the keys before it.
    for key in keys:
        known = key.name in given
        values[key.name] = _convert(key, given[key.name]) if known else key.default({**before, **values})
    return values


def embedded_pool_dir() -> Path:
    """Return the directory of a pool without a name."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "hillinfer"


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not TOML: {error}") from None


def _convert(key: Key, value: Any) -> Any:
    try:
        return key.convert(value)
    except (HillInferError, TypeError, ValueError) as error:
        reason = f" ({error})" if isinstance(error, HillInferError) else ""
        raise ConfigError(f"{key.name}: {value!r} is not allowed{reason}; give {key.allowed}") from None


def _path(value: Any) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(value)
    return Path(value).expanduser().absolute()


def _directory(value: Any) -> Path:
    path = _path(value)
    if not path.is_dir():
        raise ValueError(value)
    return path


def _size(smallest: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        size = parse_bytes(value)
        if size < smallest:
            raise ValueError(value)
        return size

    return convert


def _positive(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(value)
    return value


def _level(value: Any) -> str:
    if value not in LEVELS:
        raise ValueError(value)
    return str(value)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.isidentifier():
        raise ValueError(value)
    return value


def _one_of(*allowed: str) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if value not in allowed:
            raise ValueError(value)
        return str(value)

    return convert


def _card(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", value):
        raise ValueError(value)
    return value


def _seconds(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(value)
    return value


def _default_capacity(values: Mapping[str, Any]) -> int:
    pool = values["pool"]
    if pool is not None and names_device(pool):
        return 0
    if pool is not None and pool.is_file():
        # What is there is used; a larger one has to be asked for.
        return int(pool.stat().st_size)
    directory = pool.parent if pool is not None else values["pool_dir"]
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    half = shutil.disk_usage(directory).free // 2
    return max(SMALLEST_POOL, min(half, LARGEST_DEFAULT_POOL))


def _default_key_memory(values: Mapping[str, Any]) -> int:
    if values["driver"] == "xrt":
        return UNLIMITED  # the driver takes what the card has
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


KEYS = (
    Key(
        "runtime_dir",
        _path,
        lambda _: default_runtime_dir(),
        "a directory",
        "directory of the sockets (default: the first of $HILLINFER_RUNTIME_DIR, /run/hillinfer, "
        "$XDG_RUNTIME_DIR/hillinfer, /tmp/hillinfer-UID)",
    ),
    Key(
        "state_dir",
        _path,
        lambda _: None,
        "a directory",
        "directory of the catalogues of durable contexts (default: that of the pool file; "
        "/var/lib/hillinfer for a device)",
    ),
    Key(
        "pool_dir",
        _path,
        lambda _: embedded_pool_dir(),
        "a directory",
        "directory of a pool without a name (default: ~/.cache/hillinfer)",
    ),
    Key(
        "arena_limit",
        _size(0),
        lambda _: 1 << 30,
        "a size, for example 1GiB",
        "largest arena of one session (default: 1GiB)",
    ),
    Key(
        "session_limit",
        _positive,
        lambda _: 256,
        "a number of at least 1",
        "sessions attached at once (default: 256)",
    ),
    Key(
        "user_quota",
        _size(0),
        lambda _: UNLIMITED,
        "a size, for example 100GiB",
        "what the contexts of one user may take of a drive (default: all)",
    ),
    Key(
        "context_quota",
        _size(0),
        lambda _: UNLIMITED,
        "a size, for example 20GiB",
        "what one context may take of a drive (default: all)",
    ),
    Key(
        "request_timeout",
        _positive,
        lambda _: 60,
        "a number of seconds of at least 1",
        "longest that a drive may take for one request before its worker is replaced (default: 60)",
    ),
    Key(
        "exit_when_idle",
        _seconds,
        lambda _: 0,
        "a number of seconds, 0 for never",
        "end after so many seconds without a session (default: never)",
    ),
    Key("log_level", _level, lambda _: "info", f"one of {', '.join(LEVELS)}", "least level that is logged"),
)
"""The daemon's keys; the TOML file and the command line know these and those of a drive."""

DRIVE_KEYS = (
    Key(
        "name",
        _name,
        lambda values: f"drive{values.get('index', 0)}",
        "a name of letters, digits and underscores",
        "what status calls the drive",
    ),
    Key(
        "driver",
        _one_of("host", "xrt"),
        lambda _: "host",
        "host or xrt",
        "driver of the drive (default: host)",
    ),
    Key(
        "pool",
        _path,
        lambda _: None,
        "a file or a block device",
        "file or formatted block device of the cold pool, which keeps durable contexts (default: a file "
        "without a name, gone with the daemon)",
    ),
    Key(
        "pool_capacity",
        _size(SMALLEST_POOL),
        _default_capacity,
        "a size of at least 128KiB, for example 64GiB",
        "size of the cold pool (default: what it has, for a new file half of the free space, at most 64GiB)",
    ),
    Key(
        "evaluation_keys_dram",
        _size(0),
        _default_key_memory,
        "a size, for example 2GiB",
        "DRAM that evaluation keys may take, the rest is streamed from the drive (default: a quarter of the "
        "memory; with xrt all that the card has)",
    ),
    Key(
        "profile",
        _one_of("none", "smartssd"),
        lambda _: "none",
        "none or smartssd",
        "device whose speed the host driver keeps to (default: none)",
    ),
    Key("card", _card, lambda _: "", "a PCI address such as 0000:3b:00.1", "FPGA of a SmartSSD (xrt)"),
    Key("bitstream", _path, lambda _: None, "an xclbin file", "bitstream to configure the FPGA with (xrt)"),
    Key(
        "configurations",
        _directory,
        lambda _: None,
        "a directory that exists",
        "directory of the bitstreams that hillinferctl cec load chooses from (xrt)",
    ),
)
"""The keys of a drive: of the only one, or of each [[drive]] table of the TOML file."""


def help_of(name: str) -> str:
    """Return what to say about key ``name``."""
    return next(key.help for key in (*KEYS, *DRIVE_KEYS) if key.name == name)
