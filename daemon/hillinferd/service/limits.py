"""Who may attach and administer, what sessions and users may take, how much of the device each is given."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..domain.contexts import UNLIMITED, Quotas
from ..domain.durable import Durable


@dataclass(frozen=True)
class Limits:
    """The configuration keys of the same names; sizes in bytes, quotas for each drive, the rest by id."""

    arena_limit: int = 1 << 30
    session_limit: int = 256
    user_session_limit: int = UNLIMITED
    session_context_limit: int = UNLIMITED
    user_context_limit: int = UNLIMITED
    session_request_limit: int = 256
    user_request_limit: int = UNLIMITED
    session_quota: int = UNLIMITED
    user_quota: int = UNLIMITED
    context_quota: int = UNLIMITED
    user_weights: Mapping[int, float] = field(default_factory=dict)
    group_weights: Mapping[int, float] = field(default_factory=dict)
    attach_users: frozenset[int] = frozenset()
    attach_groups: frozenset[int] = frozenset()
    admin_groups: frozenset[int] = frozenset()

    @property
    def quotas(self) -> Quotas:
        """What concerns the contexts of a drive."""
        return Quotas(
            user=self.user_quota,
            context=self.context_quota,
            session=self.session_quota,
            session_contexts=self.session_context_limit,
            user_contexts=self.user_context_limit,
        )

    def weight_of(self, uid: int) -> float:
        """Return the weight of the user's sessions: the user's, else the greatest of their groups', else 1.

        Looks the groups up where they matter, which may block.
        """
        if uid in self.user_weights:
            return self.user_weights[uid]
        if not self.group_weights:
            return 1.0
        return max(
            (self.group_weights[gid] for gid in _groups(uid) if gid in self.group_weights), default=1.0
        )

    def may_attach(self, uid: int) -> bool:
        """Say whether the user may have sessions: all may if neither users nor groups are given.

        Whom the socket does not let in never gets here; who may administer may attach.
        Looks the groups up where they matter, which may block.
        """
        if not self.attach_users and not self.attach_groups:
            return True
        return uid in self.attach_users or _in_any(uid, self.attach_groups) or self.may_administer(uid)

    def may_read(self, uid: int, durable: Durable) -> bool:
        """Say whether the user may begin with a durable context; may block."""
        if uid in (0, durable.uid):
            return True
        return durable.gid is not None and _in_any(uid, frozenset({durable.gid}))

    def may_share(self, uid: int, gid: int) -> bool:
        """Say whether the user may have a group read what is theirs: one that they are in; may block."""
        return uid == 0 or _in_any(uid, frozenset({gid}))

    def may_administer(self, uid: int) -> bool:
        """Say whether the user is root, the daemon's own, or in one of ``admin_groups``; may block."""
        return uid in (0, os.getuid()) or _in_any(uid, self.admin_groups)


def _in_any(uid: int, groups: frozenset[int]) -> bool:
    return bool(groups) and not groups.isdisjoint(_groups(uid))


def _groups(uid: int) -> list[int]:
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return []
    return os.getgrouplist(entry.pw_name, entry.pw_gid)
