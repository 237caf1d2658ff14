"""A context: the KV of one token sequence, kept in the daemon's cold pool."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from hillinfer.evaluation import Selection, evaluate_alone
from hillinfer.fetching import fetch_range, fetch_rows
from hillinfer.keys import MirroredKeys, fetch_keys
from hillinfer.origin import Origin
from hillinfer.rows import Array, check_finite, storage_rows
from hillinfer.survival import DaemonGone, survives
from hillinfer.users import gid_of
from hillinfer_core.errors import CorruptData, HillInferError, InvalidInput
from hillinfer_core.layout import PAGE, Reduction, Shape
from hillinfer_core.v1 import cold_pool_pb2

if TYPE_CHECKING:
    from hillinfer.session import Session


class Context:
    """Opened by `Session.open_context`; freed by `close` or with its session.

    Rows reach the cold pool in whole append units. A shorter rest, the *tail*,
    waits in memory; `fetch` serves it, `evaluate` does not rank it (attend to it
    always: it is the most recent past). Thread-safe by the session's lock.

    One that begins with tokens (a durable context that is continued, or one with
    a base) goes on as if this process had appended them.
    """

    def __init__(
        self,
        session: Session,
        shape: Shape,
        asked: cold_pool_pb2.OpenContextRequest,
        opened: cold_pool_pb2.OpenContextResponse,
    ) -> None:
        self.session = session
        self.shape = shape
        self.append_unit = opened.append_unit
        self._origin = Origin(asked, opened, session.keep_bytes)
        self.evaluation_key_bytes = opened.evaluation_key_bytes
        """Evaluation keys of this context in the daemon's DRAM, as of the last append."""
        self.checksum_bytes = opened.checksum_bytes
        """Row checksums of this context in the daemon's DRAM, as of the last append."""
        self._append_limit = opened.append_limit
        self._appending: set[int] = set()
        """Layers of which `append_ahead` has a request under way."""
        self._flushed = list(opened.layer_tokens) or [0] * shape.layers
        self._tail_tokens = [0] * shape.layers
        self._tails = np.zeros(
            (shape.layers, shape.kv_heads, self.append_unit, 2, shape.head_dim), shape.dtype.storage
        )

    @property
    def context_id(self) -> int:
        """Its number in the daemon; another after a restart of the daemon. Raises `ContextLost`."""
        self._origin.check_kept()
        return self._origin.context_id

    @property
    def durable_name(self) -> str | None:
        """The name under which `save` keeps it; None for a volatile context."""
        return self._origin.durable_name

    @property
    def saved(self) -> bool:
        """Whether `save` has made it read-only."""
        return self._origin.saved

    @property
    def tail_bytes(self) -> int:
        """Bytes of the tail buffers, and of rows kept for a restart of the daemon, in this process."""
        return self._tails.nbytes + self._origin.kept_bytes

    def length(self, layer: int) -> int:
        """Tokens appended to the layer."""
        return self.flushed(layer) + self._tail_tokens[layer]

    def flushed(self, layer: int) -> int:
        """Tokens of the layer that the cold pool holds; the rest is the tail. Waits for `append_ahead`."""
        if layer in self._appending:
            with self.session.lock:
                self.session.questions.settle_appends(self.session.attached())
        if not 0 <= layer < self.shape.layers:
            raise InvalidInput(f"the context has layers 0 to {self.shape.layers - 1}, not {layer}")
        return self._flushed[layer]

    def append(self, layer: int, keys: Array, values: Array) -> None:
        """Appends n tokens to one layer.

        `keys` (after RoPE) and `values` are [kv_heads, n, head_dim] in the
        shape's dtype; bfloat16 as uint16 bits or as a dtype of that name.
        Blocks while whole units are written, in pieces as large as the arena.

        Raises `InvalidInput` for another shape or dtype and for numbers that
        are not finite, `PoolFull` and `MemoryLimit` when the daemon has no
        room, `InvalidInput` once it is saved. Pieces written before these stay:
        `length` tells how far it got.
        After `DeadlineExceeded`, `DaemonUnavailable` or an interruption it does
        not tell, and the session is of no further use unless the daemon is restarted: connect a new one.
        """
        self.flushed(layer)
        keys, values = storage_rows(self.shape, keys, "keys"), storage_rows(self.shape, values, "values")
        tokens = keys.shape[1]
        if values.shape != keys.shape:
            raise InvalidInput(f"keys are {list(keys.shape)} but values {list(values.shape)}")
        with self.session.lock:
            self._begin_append()
            held = self._tail_tokens[layer]
            rest = (held + tokens) % self.append_unit
            new_in_tail = min(rest, tokens)
            # The daemon checks what it is sent; what waits here would be refused only later, for ever.
            for array in (keys, values):
                check_finite(self.shape, array[:, tokens - new_in_tail :])
            taken = 0
            while self._tail_tokens[layer] + tokens - taken >= self.append_unit:
                taken = self._append_piece(layer, keys, values, taken)
            tail, held = self._tails[layer], self._tail_tokens[layer]
            tail[:, held : held + tokens - taken, 0] = keys[:, taken:]
            tail[:, held : held + tokens - taken, 1] = values[:, taken:]
            self._tail_tokens[layer] = held + tokens - taken

    @survives
    def append_ahead(self, layer: int, keys: Array, values: Array) -> bool:
        """Begins to append n tokens as `append` does; does not wait. Returns whether anything has begun.

        Nothing but one request does, in which tail and tokens are whole units.
        Whatever needs to know does, and finds that they are there or, after any failure, not: then they are
        to be appended again. Raises `InvalidInput` for another shape or dtype.
        """
        keys, values = storage_rows(self.shape, keys, "keys"), storage_rows(self.shape, values, "values")
        shape, session, tokens = self.shape, self.session, keys.shape[1]
        with session.lock:
            self.flushed(layer)
            held = self._tail_tokens[layer]
            count = held + tokens
            if count % self.append_unit or self.saved or count > (self._append_limit or count):
                return False
            link, questions = session.attached(), session.questions
            found = questions.room_to_append(link, (shape.kv_heads, count, 2, shape.head_dim), keys.dtype)
            if found is None:
                return False
            region, rows = found
            rows[:, :held] = self._tails[layer, :, :held]
            rows[:, held:, 0], rows[:, held:, 1] = keys, values

            def ended(response: cold_pool_pb2.AppendResponse | None) -> None:
                self._appending.discard(layer)
                if response is not None:
                    self._note_appended(region, response)
                    self._origin.keep(layer, rows)
                    self._tail_tokens[layer] = 0
                    self._flushed[layer] = response.layer_tokens

            self._appending.add(layer)
            request = self._append_request(layer, count, region)
            sent = questions.append(link, request, session.timeout_s, ended)
            if not sent:
                self._appending.discard(layer)
            return sent

    @survives
    def _begin_append(self) -> None:
        self._check_writable()
        self.check_kept()
        # Also for tokens that only reach the tail: after an unfinished append they would be misplaced.
        self.session.staging()

    @survives
    def _append_piece(self, layer: int, keys: Array, values: Array, taken: int) -> int:
        """Writes the tail and the tokens after the first `taken`, in whole units, as many as a request takes.

        Returns how many new ones are written then. What begins anew with another daemon is the piece alone:
        those before it were answered, and a daemon that does not have them is found out by `check_kept`.
        """
        self.check_kept()
        shape, unit = self.shape, self.append_unit
        staging = self.session.staging()
        piece = staging.nbytes // (shape.kv_heads * shape.row_bytes) // unit * unit
        if self._append_limit:
            piece = min(piece, self._append_limit // unit * unit)
        held = self._tail_tokens[layer]
        count = min(piece, (held + keys.shape[1] - taken) // unit * unit)
        end: int = taken + count - held
        staging.reset()
        region, rows = staging.take((shape.kv_heads, count, 2, shape.head_dim), shape.dtype.storage, PAGE)
        rows[:, :held] = self._tails[layer, :, :held]
        rows[:, held:, 0] = keys[:, taken:end]
        rows[:, held:, 1] = values[:, taken:end]
        response = self._append(layer, count, region)
        self._origin.keep(layer, rows)
        self._tail_tokens[layer] = 0
        self._flushed[layer] = response.layer_tokens
        return end

    def _append(
        self, layer: int, tokens: int, rows: cold_pool_pb2.Region, *, tail: bool = False
    ) -> cold_pool_pb2.AppendResponse:
        request = self._append_request(layer, tokens, rows, tail=tail)
        response: cold_pool_pb2.AppendResponse = self.session.call("Append", request)
        self._note_appended(rows, response)
        return response

    def _append_request(
        self, layer: int, tokens: int, rows: cold_pool_pb2.Region, *, tail: bool = False
    ) -> cold_pool_pb2.AppendRequest:
        return cold_pool_pb2.AppendRequest(
            context_id=self.context_id,
            layer=layer,
            first_token=self._flushed[layer],
            tokens=tokens,
            rows=rows,
            tail=tail,
        )

    def _note_appended(self, rows: cold_pool_pb2.Region, response: cold_pool_pb2.AppendResponse) -> None:
        self.evaluation_key_bytes = response.evaluation_key_bytes
        self.checksum_bytes = response.checksum_bytes
        self.session.counters.written_bytes += rows.length

    @survives
    def save(self, group: str | int | None = None) -> None:
        """Makes a durable context complete and read-only, its tails included.

        The members of `group`, one of this user's, may begin with it too; only the owner and
        root may delete it, and nobody changes it. `NotAllowed` for a group of others.
        From then on any number of contexts may begin with it (`Session.open_context`
        with `base`); this one still evaluates and fetches. What was appended but
        not saved when the session ends is lost as far as it was tail. Raises
        `InvalidInput` for a volatile context and for one that is saved already.
        """
        with self.session.lock:
            if self.durable_name is None:
                raise InvalidInput("a volatile context cannot be saved: open it with durable=NAME")
            if self._origin.saving and self.saved:
                return  # by the call that the daemon did not live to answer
            self._check_writable()
            gid = None if group is None else gid_of(group)
            self._origin.saving = True
            self.session.staging()
            for layer, tokens in enumerate(self._tail_tokens):
                if tokens:
                    region, rows = self._stage_tail(tokens)
                    rows[...] = self._tails[layer, :, :tokens]
                    self._append(layer, tokens, region, tail=True)
            request = cold_pool_pb2.SaveContextRequest(context_id=self.context_id, gid=gid)
            self.session.call("SaveContext", request)
            self._origin.saved, self._origin.saving = True, False

    def load_tails(self, tokens: Sequence[int]) -> None:
        """For the library's own use: brings the tails that the daemon kept, `tokens` of each layer.

        Raises `CorruptData` for lengths that no tail can have or rows that do not match their checksums.
        """
        with self.session.lock:
            if len(self._flushed) != self.shape.layers or len(tokens) not in (0, self.shape.layers):
                raise CorruptData(f"the daemon holds another number of layers than {self.shape.layers}")
            for layer, count in enumerate(tokens):
                if count >= self.append_unit:
                    raise CorruptData(
                        f"the daemon keeps a tail of {count} tokens, an append unit has {self.append_unit}"
                    )
                if count:
                    region, rows = self._stage_tail(count)
                    self.fetch_into(layer, region, tail=cold_pool_pb2.Tail())
                    self._tails[layer, :, :count] = rows
                self._tail_tokens[layer] = count

    def _stage_tail(self, tokens: int) -> tuple[cold_pool_pb2.Region, Array]:
        staging = self.session.staging()
        staging.reset()
        shape = self.shape
        return staging.take((shape.kv_heads, tokens, 2, shape.head_dim), shape.dtype.storage, PAGE)

    def _check_writable(self) -> None:
        if self.saved:
            raise InvalidInput(
                f"{self.durable_name} is saved and read-only: open a context with base={self.durable_name!r} "
                "to go on from it"
            )

    @survives
    def evaluate(
        self,
        layer: int,
        query: npt.NDArray[np.float32],
        k: int,
        *,
        first: int = 0,
        end: int | None = None,
        reduction: Reduction = Reduction.sum,
    ) -> Selection:
        """Ranks the flushed tokens first .. end-1 and returns the best k of each KV head.

        `query` is float32 [query_heads, head_dim], after RoPE, not scaled;
        `reduction` joins the scores of the query heads that share a KV head.
        `end` is all that is flushed by default. Raises `InvalidInput` for
        another shape, numbers that are not finite, a range beyond what is
        flushed, and k outside 1 .. end - first.
        """
        return evaluate_alone(self, layer, query, k, first, end, reduction)

    def fetch(self, layer: int, ids: Array | Sequence[Array]) -> tuple[Any, Any]:
        """Keys and values of the tokens `ids`, in the order asked, in the shape's storage dtype.

        `ids` [kv_heads, m] gives two arrays [kv_heads, m, head_dim]. A list of
        kv_heads arrays of any length gives two lists of arrays [m_h, head_dim].
        Raises `InvalidInput` for an id of `length` or more, `CorruptData` for a
        row that does not match its checksum.
        """
        rows = self.fetch_rows(layer, ids)
        if isinstance(ids, np.ndarray):
            rows = rows.reshape(*ids.shape, 2, self.shape.head_dim)
            return rows[:, :, 0], rows[:, :, 1]
        per_head = np.split(rows, np.cumsum([len(wanted) for wanted in ids])[:-1])
        return [part[:, 0] for part in per_head], [part[:, 1] for part in per_head]

    @survives
    def fetch_rows(self, layer: int, ids: Array | Sequence[Array]) -> Array:
        """As `fetch`, but K and V together and head after head: [sum of m_h, 2, head_dim]."""
        return fetch_rows(self, layer, ids)

    @survives
    def fetch_range(self, layer: int, first: int, count: int) -> Array:
        """Rows of the tokens first .. first+count-1: a copy, [kv_heads, count, 2 (K, V), head_dim].

        Raises `InvalidInput` for a range beyond `length`, `CorruptData` for a
        row that does not match its checksum.
        """
        return fetch_range(self, layer, first, count)

    @survives
    def fetch_keys(self, layer: int, first: int, end: int) -> MirroredKeys:
        """Evaluation keys of the flushed tokens first .. end-1, both multiples of 16: a copy.

        Blocks; in pieces as large as the arena, all of one generation. Raises
        `InvalidInput` for another range, `CorruptData` for keys that are not as
        the daemon sent them: those that lie in the cold pool it holds to the
        checksum of their sealing, and the client what arrives to the daemon's.
        """
        return fetch_keys(self, layer, first, end)

    def tail(self, layer: int) -> Array:
        """For the library's own use: rows [kv_heads, append_unit, 2, head_dim] beyond the flushed ones."""
        tail: Array = self._tails[layer]
        return tail

    def fetch_into(self, layer: int, rows: cold_pool_pb2.Region, **which: Any) -> cold_pool_pb2.FetchResponse:
        """For the library's own use, under the session's lock: a fetch, counted."""
        request = cold_pool_pb2.FetchRequest(context_id=self.context_id, layer=layer, rows=rows, **which)
        response: cold_pool_pb2.FetchResponse = self.session.call("Fetch", request)
        self.session.counters.read_bytes += response.read_bytes
        return response

    def close(self) -> None:
        """Frees the context in the daemon. Raises `UnknownContext` when called again."""
        with self.session.lock:
            # A daemon that went away has freed it already.
            if self.session.forget(self) and not self._origin.lost:
                request = cold_pool_pb2.CloseContextRequest(context_id=self._origin.context_id)
                try:
                    self.session.call("CloseContext", request)
                except DaemonGone:
                    self.session.note_gone()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except HillInferError:
            # It would hide the error that is on its way.
            if error is None:
                raise

    def check_kept(self) -> None:
        """For the library's own use: raises `ContextLost` once rows of it are gone with a daemon."""
        self._origin.check_kept()

    def note_gone(self) -> None:
        """For the library's own use: the daemon is gone."""
        self._origin.note_gone()

    def restore(self) -> None:
        """For the library's own use: opens it again in a daemon that was restarted, see `Origin.reopen`."""
        self._origin.reopen(self.session, self._flushed)
