"""How calls go through a restart of the daemon: once more, with the session attached to the new one."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from hillinfer_core.errors import DaemonUnavailable, DeadlineExceeded, DeviceUnavailable, Draining

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


RESTART_S = 10.0
"""How long a call waits for a daemon that went away to be back: systemd takes a second or two. Our choice."""

_RETRY_S = 0.05
_LEAST_ATTACH_S = 1.0
"""For the one attempt when that time is over: a socket of systemd takes anyone in at once. Our choice."""


class DaemonGone(DaemonUnavailable):
    """The daemon ended the session, most likely with itself."""


AWAY = (DaemonUnavailable, Draining, DeadlineExceeded, DeviceUnavailable)
"""What a daemon answers, or not, that is about to stop or not yet ready: worth another try."""


def survives(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Have a method of a Session or Context begin anew, once, when the daemon is gone.

    Once, as it may be this very call that the daemon dies of. The method must be such that beginning anew
    is right: it changes nothing in this process before the daemon answered.
    """

    @wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        session: Any = getattr(self, "session", self)
        with session.lock:
            try:
                try:
                    return method(self, *args, **kwargs)
                except DaemonGone:
                    session.note_gone()
                    return method(self, *args, **kwargs)
            except DaemonGone:
                session.note_gone()
                raise

    return call


def again(reattach: Callable[[float], None], since: float, restart_s: float) -> None:
    """Call `reattach` until it raises none of `AWAY`, up to `restart_s` seconds after `since` (monotonic).

    Once at least, and blocks; it is told how many seconds it may take. Raises `DaemonUnavailable` when
    the time is over.
    """
    while True:
        left = since + restart_s - time.monotonic()
        try:
            return reattach(max(left, _LEAST_ATTACH_S))
        except AWAY as error:
            if left <= 0:
                raise DaemonUnavailable(
                    f"the daemon went away, and none was back within {restart_s:g} s ({error}); the next "
                    "call tries again"
                ) from None
        time.sleep(min(_RETRY_S, max(left, 0)))
