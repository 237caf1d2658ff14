"""Turns what a client asked into what the worker may do: every number and region checked, nothing trusted."""

from __future__ import annotations

from hillinfer_core.errors import InvalidInput, OutOfOrder
from hillinfer_core.layout import PAGE, TILE_TOKENS, Reduction, Shape
from hillinfer_core.packed import NOT_WANTED, Item, Tokens, with_tokens
from hillinfer_core.reference import HISTOGRAM_BINS
from hillinfer_core.units import format_bytes

from ..domain.contexts import Catalogue, Context, key_bytes
from ..domain.regions import Region
from ..worker import messages
from . import requests
from .sessions import Session

ID_BYTES = 4
"""Bytes of a token id, of a score and of a query's number."""

SCALE_ALIGNMENT = 8
"""Bytes of a float64."""

SCALE_BYTES = 6 * SCALE_ALIGNMENT
"""Bytes of a query head's ``hillinfer_core.mass.ScoreScale``."""

MAX_RESULTS = 16384
"""Evaluations times KV heads in one request: keeps the worker's answer within one packet."""

MAX_GROUP = 128
"""Query heads for one KV head: more than any model has; each is a pass over the keys with Reduction.max."""

MAX_SCANNED = 32 << 30
"""Bytes of evaluation keys in one request, each pass over them counted: seconds from memory, within the
deadline from a drive."""

MAX_HELD = 64 << 20
"""Bytes of the ids held in one evaluation: 2 million for each of 8 KV heads, 0.2 s to look through."""

MAX_EVALUATIONS = 256
"""Evaluations in one request: keeps the message to the worker within one packet."""

MAX_FETCHED_KEYS = 8 << 20
"""Bytes of evaluation keys brought by one request: well below ``pieces.PIECE_S``; protocol limit."""

MAX_LASTING_LAYERS = 1024
"""Of a context whose requests may be repeated unchecked: more than models have, and bounds what is kept."""

SCALE_ITEM_BYTES = 4
"""Bytes of a float32 of the ranges' scale."""


def append_rows(session: Session, context: Context, ask: requests.Append) -> Region:
    """Check the region of an append; raises :class:`InvalidInput`."""
    context.layer(ask.layer)
    nbytes = context.shape.kv_heads * ask.tokens * context.shape.row_bytes
    return _check(session, "rows", ask.rows, align=PAGE, exactly=nbytes)


def append_tail(session: Session, context: Context, ask: requests.Append) -> Region:
    """Check an append of tokens that are kept aside; raises :class:`InvalidInput` or what an append does."""
    layer, shape = context.layer(ask.layer), context.shape
    if context.durable is None:
        raise InvalidInput("a tail is kept for durable contexts only")
    context.durable.check_writable()
    if not 1 <= ask.tokens < shape.append_unit:
        raise InvalidInput(f"a tail has 1 to {shape.append_unit - 1} tokens, not {ask.tokens}")
    if ask.first_token != layer.tokens:
        raise OutOfOrder(
            f"layer {ask.layer} holds {layer.tokens} tokens; a tail cannot start at {ask.first_token}"
        )
    nbytes = shape.kv_heads * ask.tokens * shape.row_bytes
    return _check(session, "rows", ask.rows, align=shape.dtype.itemsize, exactly=nbytes)


def fetch_tail(session: Session, context: Context, ask: requests.FetchTail) -> Region:
    """Check a fetch of the tokens kept aside; raises :class:`InvalidInput`."""
    context.layer(ask.layer)
    shape, tokens = context.shape, context.tails[ask.layer]
    if tokens == 0:
        return NOT_WANTED
    nbytes = shape.kv_heads * tokens * shape.row_bytes
    region = _check(session, "rows", ask.rows, align=shape.dtype.itemsize, at_least=nbytes)
    return Region(region.offset, nbytes)


def evaluate(
    session: Session, catalogue: Catalogue, ask: requests.Evaluate
) -> tuple[messages.Evaluate, list[Context]]:
    """Check a whole request; return it with the contexts of its evaluations.

    What can only change with the contexts' shapes is checked once for all requests of the same terms.
    Raises :class:`InvalidInput` or what ``Catalogue.get`` raises.
    """
    terms = ask.terms
    if not 1 <= len(terms.evaluations) <= MAX_EVALUATIONS:
        raise InvalidInput(
            f"a request takes 1 to {MAX_EVALUATIONS} evaluations, not {len(terms.evaluations)}"
        )
    contexts = [catalogue.get(session.session_id, item.context_id) for item in terms.evaluations]
    for context, item, tokens in zip(contexts, terms.evaluations, ask.tokens, strict=True):
        _check_tokens(context.layer(ask.layer).tokens, ask.layer, tokens, item.k)
    shapes = [context.shape for context in contexts]
    if terms.admitted is None or terms.admitted.shapes != shapes:
        terms.admitted = requests.Admitted(shapes, _admitted(session, shapes, terms))
    items = with_tokens(terms.admitted.items, ask.tokens)
    scanned = 0
    for shape, (first, end) in zip(shapes, ask.tokens, strict=True):
        scanned += scan_bytes(shape, first, end, terms.query_heads, terms.reduction)
    if scanned > MAX_SCANNED:
        raise InvalidInput(
            f"a request that scans {format_bytes(scanned)} of evaluation keys; at most "
            f"{format_bytes(MAX_SCANNED)} are allowed, ask in several"
        )
    request = messages.Evaluate(
        session.session_id, ask.layer, terms.query_heads, terms.reduction, items, ask.packed
    )
    return request, contexts


def lasting(session: Session, catalogue: Catalogue, ask: requests.Evaluate) -> list[int] | None:
    """Return the tokens of each layer if those are all that need be checked of ``ask``, carried out, again.

    That is for as long as no context, limit or arena changes, whatever the layer and the tokens. None for a
    request of several evaluations, or where it can depend on these whether it is one too many.
    """
    terms = ask.terms
    if len(terms.evaluations) != 1 or terms.admitted is None:
        return None
    context = catalogue.get(session.session_id, terms.evaluations[0].context_id)
    held, shape = [layer.tokens for layer in context.layers], context.shape
    if not context.loaded or [shape] != terms.admitted.shapes or len(held) > MAX_LASTING_LAYERS:
        return None
    scanned = scan_bytes(shape, 0, max(held), terms.query_heads, terms.reduction)
    return held if scanned <= MAX_SCANNED else None


def _check_tokens(held: int, layer: int, tokens: Tokens, k: int) -> None:
    first, end = tokens
    if not first < end <= held:
        raise InvalidInput(f"tokens {first} to {end} are not a range of the {held} held by layer {layer}")
    if not 1 <= k <= end - first:
        raise InvalidInput(f"k is {k}; it must be 1 to {end - first}, the tokens ranked")


def _admitted(session: Session, shapes: list[Shape], terms: requests.Terms) -> list[Item]:
    checked = [
        _evaluation(session, shape, terms, item)
        for shape, item in zip(shapes, terms.evaluations, strict=True)
    ]
    heads = sum(shape.kv_heads for shape in shapes)
    if heads > MAX_RESULTS:
        raise InvalidInput(
            f"{heads} evaluations times KV heads in one request; at most {MAX_RESULTS} are allowed"
        )
    rows = sum(item.rows.length for item in checked)
    if rows > session.arena.nbytes:
        raise InvalidInput(f"the regions for rows have {rows} bytes together, more than the arena")
    return checked


def fetch_ids(session: Session, context: Context, ask: requests.FetchIds) -> messages.FetchIds:
    """Check a fetch by ids; raises :class:`InvalidInput`. The ids themselves are the worker's to check."""
    context.layer(ask.layer)
    shape = context.shape
    if len(ask.count_per_head) != shape.kv_heads:
        raise InvalidInput(
            f"count_per_head has {len(ask.count_per_head)} entries for {shape.kv_heads} KV heads"
        )
    count = sum(ask.count_per_head)
    if count == 0:
        return messages.FetchIds(session.session_id, 0, 0, [], NOT_WANTED, NOT_WANTED)
    ids = _check(session, "ids", ask.ids, align=ID_BYTES, at_least=count * ID_BYTES)
    rows = _check(session, "rows", ask.rows, align=shape.dtype.itemsize, at_least=count * shape.row_bytes)
    return messages.FetchIds(session.session_id, ask.context_id, ask.layer, ask.count_per_head, ids, rows)


def fetch_range(session: Session, context: Context, ask: requests.FetchRange) -> messages.FetchRange:
    """Check a fetch of a run of tokens; raises :class:`InvalidInput`."""
    layer, shape = context.layer(ask.layer), context.shape
    if ask.count == 0 or ask.first_token + ask.count > layer.tokens:
        raise InvalidInput(
            f"tokens {ask.first_token} to {ask.first_token + ask.count} are not a range of the "
            f"{layer.tokens} held by layer {ask.layer}"
        )
    nbytes = shape.kv_heads * ask.count * shape.row_bytes
    rows = _check(session, "rows", ask.rows, align=shape.dtype.itemsize, at_least=nbytes)
    return messages.FetchRange(
        session.session_id, ask.context_id, ask.layer, ask.first_token, ask.count, rows, ask.count
    )


def fetch_keys(session: Session, context: Context, ask: requests.FetchKeys) -> messages.FetchKeys:
    """Check a fetch of evaluation keys; raises :class:`InvalidInput`."""
    layer, shape = context.layer(ask.layer), context.shape
    first, end = ask.first_token, ask.end_token
    if not first < end <= layer.tokens or first % TILE_TOKENS or end % TILE_TOKENS:
        raise InvalidInput(
            f"tokens {first} to {end} are not whole tiles of {TILE_TOKENS} of the {layer.tokens} tokens "
            f"held by layer {ask.layer}"
        )
    nbytes = key_bytes(shape, end - first)
    if nbytes > MAX_FETCHED_KEYS:
        raise InvalidInput(
            f"{nbytes} bytes of evaluation keys in one request; at most {MAX_FETCHED_KEYS} are brought"
        )
    tiles = _check(session, "rows", ask.tiles, align=1, at_least=nbytes)
    scale_bytes = shape.kv_heads * shape.head_dim * SCALE_ITEM_BYTES
    scales = _check(session, "scales", ask.scales, align=SCALE_ITEM_BYTES, at_least=scale_bytes)
    return messages.FetchKeys(session.session_id, ask.context_id, ask.layer, first, end, tiles, scales)


def scan_bytes(shape: Shape, first: int, end: int, query_heads: int, reduction: Reduction) -> int:
    """Return the bytes of evaluation keys that ranking ``first`` to ``end`` scans, all passes together."""
    tokens = -(-(end - first) // TILE_TOKENS) * TILE_TOKENS
    passes = 1 if reduction is Reduction.sum else query_heads // shape.kv_heads
    return key_bytes(shape, tokens) * passes


def _evaluation(session: Session, shape: Shape, ask: requests.Terms, item: requests.Evaluation) -> Item:
    heads = shape.kv_heads
    if ask.query_heads == 0 or ask.query_heads % heads:
        raise InvalidInput(f"query_heads {ask.query_heads} is not a multiple of kv_heads {heads}")
    if ask.query_heads > MAX_GROUP * heads:
        raise InvalidInput(
            f"{ask.query_heads // heads} query heads for a KV head; at most {MAX_GROUP} are allowed"
        )
    query_bytes = ask.query_heads * shape.head_dim * ID_BYTES
    apart = ask.reduction is Reduction.none
    if apart and (item.held.length or item.rows.length):
        raise InvalidInput("no rows are brought for query heads that are ranked apart: fetch them by id")
    id_bytes = (ask.query_heads if apart else heads) * item.k * ID_BYTES
    held = _optional(session, "held", item.held, align=ID_BYTES)
    if held.length > MAX_HELD:
        raise InvalidInput(f"held: {held.length} bytes of ids; at most {MAX_HELD} are looked through")
    if held.length % (heads * ID_BYTES):
        raise InvalidInput(f"held: {held.length} bytes are not the same number of ids for {heads} KV heads")
    return Item(
        context_id=item.context_id,
        first_token=0,
        end_token=0,
        k=item.k,
        query=_check(session, "query", item.query, align=ID_BYTES, exactly=query_bytes),
        ids=_check(session, "ids", item.ids, align=ID_BYTES, at_least=id_bytes),
        scores=_optional(session, "scores", item.scores, align=ID_BYTES, at_least=id_bytes),
        held=held,
        rows=_optional(session, "rows", item.rows, align=shape.dtype.itemsize),
        histogram=_of_rows(session, "histogram", item.histogram, ask, HISTOGRAM_BINS * ID_BYTES, ID_BYTES),
        scales=_of_rows(session, "scales", item.scales, ask, SCALE_BYTES, SCALE_ALIGNMENT),
    )


def _of_rows(
    session: Session, name: str, region: requests.RawRegion, ask: requests.Terms, row: int, align: int
) -> Region:
    """Check a region that there is with ``Reduction.none`` only: ``row`` bytes for each query head."""
    if ask.reduction is Reduction.none:
        return _check(session, name, region, align=align, at_least=ask.query_heads * row)
    if region.length:
        raise InvalidInput(f"{name} is of query heads that are ranked apart: leave it out")
    return NOT_WANTED


def _check(
    session: Session,
    name: str,
    region: requests.RawRegion,
    *,
    align: int,
    exactly: int | None = None,
    at_least: int = 0,
) -> Region:
    return session.arena.check(
        name,
        region.offset,
        region.length,
        region.generation,
        align=align,
        exactly=exactly,
        at_least=at_least,
    )


def _optional(
    session: Session, name: str, region: requests.RawRegion, *, align: int, at_least: int = 0
) -> Region:
    if region.length == 0:
        return NOT_WANTED
    return _check(session, name, region, align=align, at_least=at_least)
