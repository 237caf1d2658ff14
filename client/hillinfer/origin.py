"""What a context was opened with: enough to open it again in another daemon, or to know that it is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hillinfer.rows import Array
from hillinfer.survival import AWAY
from hillinfer_core.errors import ContextInUse, ContextLost, HillInferError
from hillinfer_core.layout import PAGE
from hillinfer_core.v1 import cold_pool_pb2

if TYPE_CHECKING:
    from hillinfer.session import Session


class Origin:
    """The opening of one context. The session's lock covers every call.

    `context_id` is its number in the daemon, `lost` why it is gone, empty if it is not; `saving` and
    `saved` follow `Context.save`. `keep_bytes`: of rows appended to it, if it is volatile, to be
    appended again; with more, none are kept.
    """

    def __init__(
        self,
        asked: cold_pool_pb2.OpenContextRequest,
        opened: cold_pool_pb2.OpenContextResponse,
        keep_bytes: int,
    ) -> None:
        self.durable_name = asked.durable_name or None
        self.context_id = opened.context_id
        self.lost = ""
        self.saving = False
        self.saved = False
        self._asked = asked
        self._opened = opened
        self._begun = self._held(opened)
        self.kept: list[tuple[int, Array]] = []
        """Layer and rows of each append so far, as long as all of them are kept."""
        self.kept_bytes = 0
        self._room = keep_bytes
        self._complete = self.durable_name is None

    def check_kept(self) -> None:
        """Raise `ContextLost` if it is."""
        if self.lost:
            raise ContextLost(f"{self.lost}; the session goes on")

    def keep(self, layer: int, rows: Array) -> None:
        """Note an append of `rows`, which are copied if they are to be kept."""
        if not self._complete:
            return
        if self.kept_bytes + rows.nbytes > self._room:
            self.kept, self.kept_bytes, self._complete = [], 0, False
            return
        self.kept.append((layer, rows.copy()))
        self.kept_bytes += rows.nbytes

    def note_gone(self) -> None:
        """The daemon is gone: the context is lost, unless all it held is durable or kept."""
        if self.durable_name is None and not self._complete and not self.lost:
            self.lost = (
                "the daemon was restarted, and rows appended to this context were with that daemon only: "
                "open a context and append them again"
            )

    def reopen(self, session: Session, flushed: Sequence[int]) -> None:
        """Open it again; it is lost from then on if what the daemon has is not what was there before.

        Raises what is worth another try (`AWAY`).
        """
        if self.lost:
            return
        opened = None
        try:
            opened, base = self._open(session)
            self.context_id = opened.context_id
            same = opened.durable_id == self._opened.durable_id
            # Of a context that this process wrote itself there was no checksum to compare with.
            if base and self.durable_name is None:
                kept = [(each.content_checksum, list(each.tail_tokens)) for each in (opened, self._opened)]
                same = same and kept[0] == kept[1]
            if same and self.durable_name is None:
                same = self._held(opened) == self._begun and self._append_again(session) == list(flushed)
            elif same:
                same = self._held(opened) == list(flushed)
        except AWAY:
            raise
        except HillInferError as error:
            self.lost = f"the daemon was restarted, and the context cannot be opened again ({error})"
        else:
            if same:
                return
            self.lost = (
                "the daemon was restarted, and what it has under the name is not what this process knows: "
                "open it again, and see its length"
            )
        if opened is not None:
            # Its name must be free for that.
            request = cold_pool_pb2.CloseContextRequest(context_id=opened.context_id)
            session.call("CloseContext", request)

    def _append_again(self, session: Session) -> list[int]:
        """Append what was kept, piece by piece as it was; return the tokens of each layer then."""
        held = list(self._begun)
        for layer, kept in self.kept:
            staging = session.staging()
            staging.reset()
            region, rows = staging.take(kept.shape, kept.dtype, PAGE)
            rows[...] = kept
            request = cold_pool_pb2.AppendRequest(
                context_id=self.context_id,
                layer=layer,
                first_token=held[layer],
                tokens=kept.shape[1],
                rows=region,
            )
            held[layer] = session.call("Append", request).layer_tokens
        return held

    def _open(self, session: Session) -> tuple[cold_pool_pb2.OpenContextResponse, bool]:
        """Return the answer, and whether it is a reader's."""
        request = cold_pool_pb2.OpenContextRequest()
        request.CopyFrom(self._asked)
        if self.durable_name is not None and not self.saved:
            try:
                return session.call("OpenContext", request), False
            except ContextInUse:
                # Perhaps saved by the very call that the daemon did not live to answer.
                if not self.saving:
                    raise
                self.saved = True
        if self.durable_name is not None:
            request.base_name = self.durable_name
        return session.call("OpenContext", request), bool(request.base_name)

    def _held(self, opened: Any) -> list[int]:
        return list(opened.layer_tokens) or [0] * self._asked.layers
