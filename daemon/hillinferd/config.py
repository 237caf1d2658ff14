"""Configuration: one table of keys, filled from defaults, a TOML file and the command line, in that order."""

from __future__ import annotations

import difflib
import os
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hillinfer_core.errors import ConfigError
from hillinfer_core.protocol import default_runtime_dir

from . import config_key
from .config_key import Key
from .config_limits import LIMIT_KEYS
from .domain.contexts import UNLIMITED
from .domain.extents import GRANULE
from .driver.block import names_device
from .logs import LEVELS
from .service.limits import Limits

LARGEST_DEFAULT_POOL = 64 << 30
"""Bytes that the cold pool takes at most unless told otherwise."""

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
    limits: Limits
    request_timeout: int
    exit_when_idle: int
    metrics_file: Path | None
    log_level: str
    drives: tuple[DriveConfig, ...]


def load(file: Path | None, overrides: Mapping[str, Any]) -> Config:
    """Return the configuration; see :func:`read` and :func:`build`."""
    return build(read(file, overrides))


def read(file: Path | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that are given and their values as they were written.

    ``overrides`` maps keys to values from the command line, None for not given. Raises :class:`ConfigError`
    for a file that cannot be read or is not TOML.
    """
    given = _read(file) if file else {}
    given.update({name: value for name, value in overrides.items() if value is not None})
    return given


def build(given: Mapping[str, Any]) -> Config:
    """Return the configuration that ``given`` and the defaults make.

    Raises :class:`ConfigError` that names the key, the value and what is allowed.
    """
    given = dict(given)
    tables = given.pop("drive", None)
    if tables is None:
        values = _values((*KEYS, *DRIVE_KEYS), given, {})
        drives = [{key.name: values.pop(key.name) for key in DRIVE_KEYS}]
    else:
        values = _values(KEYS, given, {})
        drives = _drives(tables, values["pool_dir"])
    limits = Limits(**{key.name: values.pop(key.name) for key in LIMIT_KEYS})
    for drive in drives:
        if drive["bitstream"] and drive["configurations"]:
            raise ConfigError(
                f"drive {drive['name']} has bitstream and configurations; give one of them: hillinferctl cec "
                "load chooses from configurations"
            )
    return Config(**values, limits=limits, drives=tuple(DriveConfig(**drive) for drive in drives))


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
        values[key.name] = (
            config_key.convert(key, given[key.name]) if known else key.default({**before, **values})
        )
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
    except (ValueError, RecursionError) as error:
        # Also text that is not UTF-8, and tables within tables without end.
        raise ConfigError(f"{file} is not TOML: {str(error).splitlines()[0]}") from None


def _default_capacity(values: Mapping[str, Any]) -> int:
    pool = values["pool"]
    if pool is not None and names_device(pool):
        return 0
    if pool is not None and os.path.isfile(pool) and (size := pool.stat().st_size):
        # What is there is used; a larger one has to be asked for.
        return int(size)
    directory = pool.parent if pool is not None else values["pool_dir"]
    while not os.path.exists(directory) and directory != directory.parent:
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
        config_key.path,
        lambda _: default_runtime_dir(),
        "a directory",
        "directory of the sockets (default: the first of $HILLINFER_RUNTIME_DIR, /run/hillinfer, "
        "$XDG_RUNTIME_DIR/hillinfer, /tmp/hillinfer-UID)",
    ),
    Key(
        "state_dir",
        config_key.path,
        lambda _: None,
        "a directory",
        "directory of the catalogues of durable contexts (default: that of the pool file; "
        "/var/lib/hillinfer for a device)",
    ),
    Key(
        "pool_dir",
        config_key.path,
        lambda _: embedded_pool_dir(),
        "a directory",
        "directory of a pool without a name (default: ~/.cache/hillinfer)",
    ),
    *LIMIT_KEYS,
    Key(
        "request_timeout",
        config_key.positive,
        lambda _: 60,
        "a number of seconds of at least 1",
        "longest that a drive may take for one request before its worker is replaced (default: 60)",
    ),
    Key(
        "exit_when_idle",
        config_key.seconds,
        lambda _: 0,
        "a number of seconds, 0 for never",
        "end after so many seconds without a session (default: never)",
    ),
    Key(
        "metrics_file",
        config_key.path,
        lambda _: None,
        "a file",
        "file of metrics for node_exporter's textfile collector, whose name must end in .prom; the socket "
        "metrics.sock has them anyway (default: none)",
    ),
    Key(
        "log_level",
        config_key.level,
        lambda _: "info",
        f"one of {', '.join(LEVELS)}",
        "least level that is logged",
    ),
)
"""The daemon's keys; the TOML file and the command line know these and those of a drive."""

DRIVE_KEYS = (
    Key(
        "name",
        config_key.name,
        lambda values: f"drive{values.get('index', 0)}",
        "a name of letters, digits and underscores",
        "what status calls the drive",
    ),
    Key(
        "driver",
        config_key.one_of("host", "xrt"),
        lambda _: "host",
        "host or xrt",
        "driver of the drive (default: host)",
    ),
    Key(
        "pool",
        config_key.path,
        lambda _: None,
        "a file or a block device",
        "file or formatted block device of the cold pool, which keeps durable contexts (default: a file "
        "without a name, gone with the daemon)",
    ),
    Key(
        "pool_capacity",
        config_key.size(SMALLEST_POOL),
        _default_capacity,
        "a size of at least 128KiB, for example 64GiB",
        "size of the cold pool (default: what it has, for a new file half of the free space, at most 64GiB)",
    ),
    Key(
        "evaluation_keys_dram",
        config_key.size(0),
        _default_key_memory,
        "a size, for example 2GiB",
        "DRAM that evaluation keys may take, the rest is streamed from the drive (default: a quarter of the "
        "memory; with xrt all that the card has)",
    ),
    Key(
        "profile",
        config_key.one_of("none", "smartssd", "smartssd_third"),
        lambda _: "none",
        "none or smartssd",
        "device whose speed the host driver keeps to (default: none)",
    ),
    Key(
        "card",
        config_key.card,
        lambda _: "",
        "a PCI address such as 0000:3b:00.1",
        "FPGA of a SmartSSD (xrt)",
    ),
    Key(
        "bitstream",
        config_key.path,
        lambda _: None,
        "an xclbin file",
        "bitstream to configure the FPGA with (xrt)",
    ),
    Key(
        "configurations",
        config_key.directory,
        lambda _: None,
        "a directory that exists",
        "directory of the bitstreams that hillinferctl cec load chooses from (xrt)",
    ),
)
"""The keys of a drive: of the only one, or of each [[drive]] table of the TOML file."""


def help_of(name: str) -> str:
    """Return what to say about key ``name``."""
    return next(key.help for key in (*KEYS, *DRIVE_KEYS) if key.name == name)
