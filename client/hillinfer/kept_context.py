"""The context that a run keeps under a name, or finds under it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import torch

from hillinfer.attachment import Attachment
from hillinfer.fingerprint import tokens_fingerprint
from hillinfer.hkm.cache import HierarchicalCache
from hillinfer_core.errors import ContextInUse, UnknownContext


def open_kept(
    attachment: Attachment,
    name: str,
    ids: torch.Tensor,
    say: Callable[[str], None],
    owner: str | None = None,
) -> tuple[HierarchicalCache, bool]:
    """Return a cache for the text of token ids `ids`, and whether it holds them already.

    If not, the caller reads them into it and saves it. What an interrupted run
    left under the name is deleted. Another user's is only read: UnknownContext
    where `owner` has none for this user. `say` gets what the user should know. Blocks.
    Raises ContextMismatch, naming what differs, when the name belongs to
    something else; ContextInUse; and what `Attachment.new_cache` raises.
    """
    session, labels = attachment.session, {"text": tokens_fingerprint(ids)}
    found = session.find_context(name, owner)
    if found is not None and found.saved:
        cache = attachment.new_cache(base=name, owner=owner, labels=labels)
        made = datetime.fromtimestamp(found.created_unix_s)
        say(f"context {name}, saved {made:%Y-%m-%d %H:%M}, {found.tokens:,} tokens, prefill skipped")
        return cache, True
    if owner is not None:
        raise UnknownContext(f"user {owner} has no saved context {name!r} that this user may read")
    if found is not None:
        if found.users:
            raise ContextInUse(
                f"another program is reading a text into {name} now: "
                "try again when that is done, or choose another name"
            )
        session.delete_context(name)
        say(f"context {name} was left unfinished by an interrupted run: deleted, the text is read again")
    return attachment.new_cache(durable=name, labels=labels), False
