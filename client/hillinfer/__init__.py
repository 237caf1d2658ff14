"""HillInfer's client library: long contexts whose KV cache lives in a daemon's cold pool.

`attach` plugs HillInfer into a transformers model (needs the ``transformers``
extra). `Session` and `Context` are the layer below it, on numpy arrays, for
applications with an attention of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hillinfer.context import Context
from hillinfer.durable import DurableContext
from hillinfer.evaluation import Brought, EvaluateItem, Selection
from hillinfer.private_daemon import PrivateDaemon
from hillinfer.session import Session
from hillinfer_core import errors
from hillinfer_core.layout import DType, Precision, Reduction, Shape

if TYPE_CHECKING:
    from hillinfer.attachment import attach

__all__ = [
    "Brought",
    "Context",
    "DType",
    "DurableContext",
    "EvaluateItem",
    "Precision",
    "PrivateDaemon",
    "Reduction",
    "Selection",
    "Session",
    "Shape",
    "attach",
    "errors",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import and the base install does not have it.
    if name == "attach":
        from hillinfer.attachment import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
