"""What a configuration key is, and how its values are converted."""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hillinfer_core.errors import ConfigError, HillInferError
from hillinfer_core.units import parse_bytes

from .logs import LEVELS


@dataclass(frozen=True)
class Key:
    """One configuration key: how a value is converted, what is the default, and what to say about it."""

    name: str
    convert: Callable[[Any], Any]
    default: Callable[[Mapping[str, Any]], Any]
    allowed: str
    help: str


def convert(key: Key, value: Any) -> Any:
    """Return the value of ``key``; raises :class:`ConfigError` that names key, value and what is allowed."""
    try:
        return key.convert(value)
    except (HillInferError, TypeError, ValueError) as error:
        reason = f" ({error})" if isinstance(error, HillInferError) else ""
        raise ConfigError(f"{key.name}: {value!r} is not allowed{reason}; give {key.allowed}") from None


def path(value: Any) -> Path:
    """Take a path, ``~`` allowed."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError(value)
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError:
        raise ValueError(value) from None  # the home of a user that there is not


def directory(value: Any) -> Path:
    """Take a directory that exists."""
    found = path(value)
    if not os.path.isdir(found):
        raise ValueError(value)
    return found


def size(smallest: int) -> Callable[[Any], int]:
    """Take a number of bytes, also with a unit."""

    def take(value: Any) -> int:
        nbytes = parse_bytes(value)
        if nbytes < smallest:
            raise ValueError(value)
        return nbytes

    return take


def positive(value: Any) -> int:
    """Take a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(value)
    return value


def level(value: Any) -> str:
    """Take a log level."""
    if value not in LEVELS:
        raise ValueError(value)
    return str(value)


def name(value: Any) -> str:
    """Take a name of letters, digits and underscores."""
    if not isinstance(value, str) or not value.isidentifier():
        raise ValueError(value)
    return value


def one_of(*allowed: str) -> Callable[[Any], str]:
    """Take one of ``allowed``."""

    def take(value: Any) -> str:
        if value not in allowed:
            raise ValueError(value)
        return str(value)

    return take


def card(value: Any) -> str:
    """Take a PCI address."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", value):
        raise ValueError(value)
    return value


def seconds(value: Any) -> int:
    """Take whole seconds, 0 included."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(value)
    return value


def user_weights(value: Any) -> dict[int, float]:
    """Take a table of weights by the name or number of a user."""
    return _weights(value, _user)


def group_weights(value: Any) -> dict[int, float]:
    """Take a table of weights by the name or number of a group."""
    return _weights(value, _group)


def users(value: Any) -> frozenset[int]:
    """Take a list of names or numbers of users."""
    return _numbers(value, _user)


def groups(value: Any) -> frozenset[int]:
    """Take a list of names or numbers of groups."""
    return _numbers(value, _group)


def _user(user: str) -> int:
    return pwd.getpwnam(user).pw_uid


def _group(group: str) -> int:
    return grp.getgrnam(group).gr_gid


def _numbers(value: Any, number_of: Callable[[str], int]) -> frozenset[int]:
    if not isinstance(value, list):
        raise ValueError(value)
    for who in value:
        if isinstance(who, bool) or not isinstance(who, int | str) or (isinstance(who, int) and who < 0):
            raise ValueError(value)
    return frozenset(who if isinstance(who, int) else _number(who, number_of) for who in value)


def _number(who: str, number_of: Callable[[str], int]) -> int:
    try:
        return int(who) if who.isdecimal() else number_of(who)
    except KeyError:
        raise ConfigError(f"{who} is not known to this machine") from None


def _weights(value: Any, number_of: Callable[[str], int]) -> dict[int, float]:
    if not isinstance(value, dict):
        raise ValueError(value)
    weights = {}
    for who, weight in value.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.01 <= weight <= 100:
            raise ConfigError(f"{who} has weight {weight!r}")
        weights[_number(who, number_of)] = float(weight)
    return weights
