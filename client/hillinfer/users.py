"""Users and groups of this machine, by name or number."""

from __future__ import annotations

import grp
import os
import pwd

from hillinfer_core.errors import InvalidInput, NotAllowed


def uid_of(user: str | int) -> int:
    """Return the number of a user; raises `InvalidInput` for a name that is none."""
    try:
        return user if isinstance(user, int) else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise InvalidInput(f"there is no user {user!r} here: give a name that `getent passwd` has") from None


def gid_of(group: str | int) -> int:
    """Return the number of a group; raises `InvalidInput` for a name that is none."""
    try:
        return group if isinstance(group, int) else grp.getgrnam(group).gr_gid
    except KeyError:
        raise InvalidInput(f"there is no group {group!r} here: give a name that `getent group` has") from None


def check_own_group(group: str | int) -> None:
    """Raise `NotAllowed` for a group that this user is not in, as the daemon would; root may name any."""
    gid, uid = gid_of(group), os.getuid()
    if uid and gid not in os.getgrouplist(pwd.getpwuid(uid).pw_name, pwd.getpwuid(uid).pw_gid):
        raise NotAllowed(f"you are not in group {group}: name one of your own (`id`)")
