"""``python -m hillinferd.example_config``: the system service's configuration file, every key explained."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from . import config
from .config_key import Key
from .domain.contexts import UNLIMITED
from .reload import LIVE

SERVICE: Mapping[str, Any] = {
    "runtime_dir": "/run/hillinfer",
    "state_dir": "/var/lib/hillinfer",
    "pool": "/var/lib/hillinfer/pool",
}
"""What the system service is given; all else keeps its default."""

EXAMPLES: Mapping[str, Any] = {
    "metrics_file": "/var/lib/hillinfer/metrics.prom",
    "pool_dir": "/var/cache/hillinfer",
    "user_weights": {"1000": 2.0},
    "group_weights": {"1000": 0.5},
    "attach_users": [1000],
    "attach_groups": [1000],
    "admin_groups": [1000],
    "pool_capacity": "64GiB",
    "evaluation_keys_dram": "2GiB",
    "card": "0000:3b:00.1",
    "bitstream": "/etc/hillinfer/kernel.xclbin",
    "configurations": "/etc/hillinfer/configurations",
}
"""Values to show for keys whose default is none, or depends on the machine."""

_ABOUT = """\
# Configuration of hillinferd, the system service. Lines without # are set; the others show a key with its
# default or, where the default is none or depends on the machine, with an example.
# `systemctl reload hillinferd` applies changes of keys that say "applies at a reload", and logs which others
# need `systemctl restart hillinferd`.
"""

_ABOUT_DRIVES = """\
# The drive. For several, leave these keys out here and write a table for each instead:
#   [[drive]]
#   name = "fast"
#   pool = "/dev/disk/by-id/nvme-..."
# A pool outside /var/lib/hillinfer must be opened to the service as well: see docs/systemd.md.
"""


def text() -> str:
    """Return the file."""
    parts = [_ABOUT, *map(_entry, config.KEYS), _ABOUT_DRIVES, *map(_entry, config.DRIVE_KEYS)]
    return "\n".join(parts)


def example(key: Key) -> Any:
    """Return the value that the file shows for ``key``."""
    for given in (SERVICE, EXAMPLES):
        if key.name in given:
            return given[key.name]
    default = key.default({})
    if default == UNLIMITED:
        return "100GiB" if "size" in key.allowed else 64
    return default


def _entry(key: Key) -> str:
    note = f"{key.help[0].upper()}{key.help[1:]}. Give {key.allowed}"
    note += "; applies at a reload." if key.name in LIVE else "."
    lines = textwrap.wrap(note, 108, break_on_hyphens=False)
    sign = "" if key.name in SERVICE else "#"
    return "".join(f"# {line}\n" for line in lines) + f"{sign}{key.name} = {_toml(example(key))}\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_toml(name)} = {_toml(each)}" for name, each in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else '"' + str(value).replace('"', '\\"') + '"'


if __name__ == "__main__":
    print(text(), end="")
