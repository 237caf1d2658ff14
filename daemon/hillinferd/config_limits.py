"""The configuration keys of :class:`~hillinferd.service.limits.Limits`: what sessions and users may take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import config_key
from .config_key import Key
from .service.limits import Limits

_SIZE = config_key.size(0)
_A_SIZE = "a size, for example 100GiB"
_A_NUMBER = "a number of at least 1"
_WEIGHTS = "a table of names or numbers with weights of 0.01 to 100"


def _key(name: str, convert: Callable[[Any], Any], allowed: str, say: str) -> Key:
    default = getattr(Limits(), name)
    return Key(name, convert, lambda _: default, allowed, say)


LIMIT_KEYS = (
    _key(
        "arena_limit",
        _SIZE,
        "a size, for example 1GiB",
        "largest arena of one session (default: 1GiB)",
    ),
    _key(
        "session_limit",
        config_key.positive,
        _A_NUMBER,
        "sessions attached at once (default: 256)",
    ),
    _key(
        "user_session_limit",
        config_key.positive,
        _A_NUMBER,
        "sessions of one user attached at once (default: all)",
    ),
    _key(
        "session_context_limit",
        config_key.positive,
        _A_NUMBER,
        "contexts that one session may have open on a drive (default: no limit)",
    ),
    _key(
        "user_context_limit",
        config_key.positive,
        _A_NUMBER,
        "contexts that one user may have open on a drive (default: no limit)",
    ),
    _key(
        "session_request_limit",
        config_key.positive,
        _A_NUMBER,
        "requests of one session in flight at once (default: 256)",
    ),
    _key(
        "user_request_limit",
        config_key.positive,
        _A_NUMBER,
        "requests of one user in flight at once (default: no limit)",
    ),
    _key(
        "session_quota",
        _SIZE,
        _A_SIZE,
        "what the contexts that one session has open may take of a drive (default: all)",
    ),
    _key(
        "user_quota",
        _SIZE,
        _A_SIZE,
        "what the contexts of one user may take of a drive (default: all)",
    ),
    _key(
        "context_quota",
        _SIZE,
        "a size, for example 20GiB",
        "what one context may take of a drive (default: all)",
    ),
    _key(
        "user_weights",
        config_key.user_weights,
        _WEIGHTS,
        "share of the device that each session of a user is given, before group_weights (default: 1)",
    ),
    _key(
        "group_weights",
        config_key.group_weights,
        _WEIGHTS,
        "the same for the users in a group, the greatest of several counts (default: 1)",
    ),
)
"""One for each field, with its default."""
