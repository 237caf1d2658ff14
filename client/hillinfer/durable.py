"""Durable contexts as the daemon lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import DType, Precision, Shape
from hillinfer_core.v1 import cold_pool_pb2


def is_text(word: str) -> bool:
    """Whether UTF-8 can say it: a command line's words may hold bytes that are none."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class DurableContext:
    """A context that outlives its session. See `Session.list_contexts`."""

    name: str
    uid: int
    """The user who owns it; names are each user's own."""
    saved: bool
    """Complete and read-only; until then only one session at a time may have it, to append to it."""
    tokens: int
    """Of the first layer, the tail included."""
    extent_bytes: int
    """Of the cold pool."""
    shape: Shape
    labels: Mapping[str, str]
    """What it was made from, as given to `Session.open_context`."""
    created_unix_s: int
    users: int
    """Contexts that are open on it now."""
    drive: str
    gid: int | None = None
    """Members of this group may begin with it too."""

    @classmethod
    def from_proto(cls, listed: cold_pool_pb2.DurableContext) -> DurableContext:
        """Return the context of a ListContexts answer."""
        return cls(
            name=listed.name,
            uid=listed.uid,
            saved=listed.saved,
            tokens=listed.tokens,
            extent_bytes=listed.extent_bytes,
            shape=Shape(
                listed.layers,
                listed.kv_heads,
                listed.head_dim,
                DType.from_proto(listed.dtype),
                Precision.from_proto(listed.precision),
            ),
            labels=dict(listed.labels),
            created_unix_s=listed.created_unix_s,
            users=listed.users,
            drive=listed.drive,
            gid=listed.gid if listed.HasField("gid") else None,
        )


def check_names(durable: str | None, base: str | None, labels: Mapping[str, str] | None) -> None:
    """Raise `InvalidInput` for what `Session.open_context` cannot be asked for together."""
    if durable is not None and base is not None:
        raise InvalidInput("a context is durable or has a base, not both")
    if "" in (durable, base):
        raise InvalidInput("the name of a context cannot be empty")
    words = {"the name of a context": durable or base or "", **(labels or {})}
    for what, word in words.items():
        if not is_text(word) or not is_text(what):
            raise InvalidInput(f"{what!a} is no UTF-8 text: {word!a}")
    if labels and durable is None and base is None:
        raise InvalidInput("labels are for contexts with a name: give durable or base")
