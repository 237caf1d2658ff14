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
_USERS = "a list of names or numbers of users"
_GROUPS = "a list of names or numbers of groups"
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
    _key(
        "attach_users",
        config_key.users,
        _USERS,
        "users who may attach, with those in attach_groups and administrators (default, with no "
        "attach_groups either: all whom the mode of the socket lets in)",
    ),
    _key(
        "attach_groups",
        config_key.groups,
        _GROUPS,
        "groups whose users may attach",
    ),
    _key(
        "admin_groups",
        config_key.groups,
        _GROUPS,
        "groups whose users may administer, as root and the daemon's own user may (default: none)",
    ),
)
"""One for each field, with its default."""
