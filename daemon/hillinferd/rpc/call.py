"""What every method asks of its call: whose it is, and how long it may take."""

from __future__ import annotations

import time
from typing import Any

import grpc.aio

from hillinfer_core.protocol import TOKEN_KEY

from ..service.cold_pool import ColdPoolService
from ..service.sessions import Session

Context = grpc.aio.ServicerContext[Any, Any]


def session_of(service: ColdPoolService, context: Context) -> Session:
    """Return the session whose token the call carries; raises ``ForeignToken``."""
    token = None
    for key, value in context.invocation_metadata() or ():
        if key == TOKEN_KEY and isinstance(value, str):
            token = value
    return service.sessions.by_token(token)


def deadline_of(context: Context) -> float | None:
    """Return the call's deadline as a ``time.monotonic()``, None for none."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
