"""What sessions and users may take, and how much of the device each is given."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..domain.contexts import UNLIMITED, Quotas


@dataclass(frozen=True)
class Limits:
    """The configuration keys of the same names; sizes in bytes, quotas for each drive, weights by id."""

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


def _groups(uid: int) -> list[int]:
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return []
    return os.getgrouplist(entry.pw_name, entry.pw_gid)
