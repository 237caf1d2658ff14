"""Configuration: one table of keys, filled from defaults, a TOML file and the command line, in that order."""

from __future__ import annotations

import difflib
import os
import shutil
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hillinfer_core.errors import ConfigError, HillInferError
from hillinfer_core.protocol import default_runtime_dir
from hillinfer_core.units import parse_bytes

from .domain.extents import GRANULE
from .logs import LEVELS

LARGEST_DEFAULT_POOL = 64 << 30
"""Bytes that the cold pool takes at most unless told otherwise."""

SMALLEST_POOL = 2 * GRANULE
"""Bytes of a pool that has room for its header and one extent."""


@dataclass(frozen=True)
class Config:
    """What the daemon runs with; sizes in bytes. ``pool`` is None for a file without a name."""

    runtime_dir: Path
    pool: Path | None
    pool_capacity: int
    evaluation_keys_dram: int
    arena_limit: int
    session_limit: int
    log_level: str


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
    names = [key.name for key in KEYS]
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            raise ConfigError(f"{name} is not a key; use {close[0] if close else ', '.join(names)}")
    values: dict[str, Any] = {}
    # In the table's order: a default may look at the keys before it.
    for key in KEYS:
        values[key.name] = _convert(key, given[key.name]) if key.name in given else key.default(values)
    return Config(**values)


def pool_directory(pool: Path | None) -> Path:
    """Return the directory of the pool file: of ``pool``, or of the embedded default."""
    if pool is not None:
        return pool.parent
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


def _default_capacity(values: Mapping[str, Any]) -> int:
    directory = pool_directory(values["pool"])
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    half = shutil.disk_usage(directory).free // 2
    return max(SMALLEST_POOL, min(half, LARGEST_DEFAULT_POOL))


def _quarter_of_memory(_: Mapping[str, Any]) -> int:
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
        "pool",
        _path,
        lambda _: None,
        "a file",
        "file of the cold pool (default: one without a name in ~/.cache/hillinfer, gone with the daemon)",
    ),
    Key(
        "pool_capacity",
        _size(SMALLEST_POOL),
        _default_capacity,
        "a size of at least 128KiB, for example 64GiB",
        "size of the cold pool (default: half of the free space there, at most 64GiB)",
    ),
    Key(
        "evaluation_keys_dram",
        _size(0),
        _quarter_of_memory,
        "a size, for example 2GiB",
        "DRAM that evaluation keys may take (default: a quarter of the memory)",
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
    Key("log_level", _level, lambda _: "info", f"one of {', '.join(LEVELS)}", "least level that is logged"),
)
"""Every key; the TOML file and the command line know exactly these."""


def help_of(name: str) -> str:
    """Return what to say about key ``name``."""
    return next(key.help for key in KEYS if key.name == name)
