"""Typed errors that cross the process boundary by class name.

The daemon sends the class name in trailing metadata (:data:`hillinfer_core.protocol.ERROR_KEY`) with the
gRPC status code named by ``status``; the client raises the same class again through :func:`by_name`.
"""

# ruff: noqa: N818 -- the names are on the wire and say what happened
from __future__ import annotations

from typing import ClassVar


class HillInferError(Exception):
    """Base of every error raised on purpose by hillinfer; the message says what to do next."""

    status: ClassVar[str] = "UNKNOWN"


class InvalidInput(HillInferError):
    """An argument has a wrong shape, dtype, range or value."""

    status = "INVALID_ARGUMENT"


class UnknownContext(HillInferError):
    """The context id is not one of this session's open contexts."""

    status = "NOT_FOUND"


class ForeignToken(HillInferError):
    """The session token is missing, unknown, or belongs to a session that has ended."""

    status = "UNAUTHENTICATED"

    def __init__(self, message: str = "unknown or foreign token") -> None:
        super().__init__(message)


class PoolFull(HillInferError):
    """The cold pool has no free extent of the size that is needed."""

    status = "RESOURCE_EXHAUSTED"


class MemoryLimit(HillInferError):
    """The daemon's limit for evaluation keys in DRAM (``evaluation_keys_dram``) is reached."""

    status = "RESOURCE_EXHAUSTED"


class QuotaExceeded(HillInferError):
    """A per-session or per-user quota is reached."""

    status = "RESOURCE_EXHAUSTED"


class OutOfOrder(HillInferError):
    """An append does not start where the layer ends."""

    status = "FAILED_PRECONDITION"


class VersionMismatch(HillInferError):
    """Client and daemon speak different protocol or layout versions."""

    status = "FAILED_PRECONDITION"


class DeviceUnavailable(HillInferError):
    """The device worker died or the drive is gone; contexts held there are lost."""

    status = "UNAVAILABLE"


class DaemonUnavailable(HillInferError):
    """No daemon answers at the socket, or it went away."""

    status = "UNAVAILABLE"


class ContextLost(DaemonUnavailable):
    """The daemon was restarted, and rows of the context were nowhere but in the one before."""


class Draining(HillInferError):
    """The daemon takes in no new sessions and contexts: it is about to stop, or is being looked after."""

    status = "UNAVAILABLE"


class DeadlineExceeded(HillInferError):
    """The call was not finished within its deadline."""

    status = "DEADLINE_EXCEEDED"


class Cancelled(HillInferError):
    """The caller asked for the work to be given up."""

    status = "CANCELLED"


class CorruptData(HillInferError):
    """A row read from the cold pool does not match its checksum."""

    status = "DATA_LOSS"


class ContextMismatch(HillInferError):
    """A durable context was made from something else than what is asked for; the message names what."""

    status = "FAILED_PRECONDITION"


class ContextInUse(HillInferError):
    """A durable context is open elsewhere in a way that does not go together with what is asked for."""

    status = "FAILED_PRECONDITION"


class DamagedCatalogue(HillInferError):
    """The record of durable contexts does not agree with itself or with the pool."""

    status = "DATA_LOSS"


class NotAllowed(HillInferError):
    """The caller's user may not do this."""

    status = "PERMISSION_DENIED"


class AlreadyRunning(HillInferError):
    """Another daemon holds the runtime directory."""

    status = "FAILED_PRECONDITION"


class ConfigError(HillInferError):
    """A configuration key or value is not accepted."""

    status = "INVALID_ARGUMENT"


class BudgetTooSmall(HillInferError):
    """The budget does not cover the sinks and the recent window."""

    status = "INVALID_ARGUMENT"


class ResidentTooSmall(HillInferError):
    """The resident limit cannot hold what a step needs."""

    status = "RESOURCE_EXHAUSTED"


class UnsupportedModel(HillInferError):
    """The model's architecture or attention cannot be attached."""

    status = "INVALID_ARGUMENT"


class UnreadableModel(HillInferError):
    """The model directory cannot be loaded."""

    status = "INVALID_ARGUMENT"


class BadBitstream(HillInferError):
    """A bitstream is malformed, is not the one in the catalogue, or was built for another shell."""

    status = "FAILED_PRECONDITION"


_CLASSES: list[type[HillInferError]] = [HillInferError, *HillInferError.__subclasses__(), ContextLost]
_BY_NAME = {cls.__name__: cls for cls in _CLASSES}


def name_of(error: HillInferError) -> str:
    """Return the name that :func:`by_name` knows the error by: of its class, or of the nearest one above."""
    return next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _BY_NAME)


def by_name(name: str) -> type[HillInferError]:
    """Return the error class called ``name``, or :class:`HillInferError` for a name not known here."""
    return _BY_NAME.get(name, HillInferError)
