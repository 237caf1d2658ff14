"""The plan: what suits a model, a context and a card, what time it will take and what sets that time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hillinfer_core.errors import InvalidInput
from hillinfer_core.layout import TILE_TOKENS, Precision, Reduction, tile_bytes
from hillinfer_core.units import Budget, format_bytes

from .cards import Card, Resources
from .configurations import BEAT_BYTES, Configuration, beat_lanes, beats_of_tile, shipped_for
from .model import Model
from .resources import estimate

LARGEST_CONTEXT = 1 << 30
"""Most tokens that a plan is made for; also keeps every id in 32 bits."""

EQUAL_TIME = 1.02
"""INT8 is preferred where INT4 would gain less than this factor. Our choice."""

PAIRS_A_WORD, HISTOGRAM_BYTES, OFFSET_BYTES = 8, 8192, BEAT_BYTES
# (id, score) pairs of 8 bytes in a beat; 2,048 counts of 4 bytes; a beat of offsets. As in hls/evaluate.hpp.


@dataclass(frozen=True)
class Request:
    """What is asked for; None leaves it to the planner. ``guarantee`` is the mode with error bounds."""

    model: Model
    context: int
    card: Card
    budget: Budget
    precision: Precision | None = None
    reduction: Reduction = Reduction.sum
    guarantee: bool = False
    lanes: int | None = None
    heads_in_flight: int | None = None


@dataclass(frozen=True)
class LayerPlan:
    """One layer: bytes of its evaluation keys and where they are, seconds of each part; parts overlap."""

    layer: int
    key_bytes: int
    dram_bytes: int
    nand_bytes: int
    seconds: dict[str, float]

    @property
    def bottleneck(self) -> str:
        """The part that sets the time: NAND, DRAM, compute or link."""
        return max(self.seconds, key=lambda part: self.seconds[part])

    @property
    def time_s(self) -> float:
        """Seconds from the query to the last result."""
        return self.seconds[self.bottleneck]


@dataclass(frozen=True)
class Plan:
    """A plan. ``lanes`` is key elements multiplied a cycle, ``runs`` of the kernel serve one head."""

    request: Request
    precision: Precision
    query_bits: int
    lanes: int
    heads_in_flight: int
    runs: int
    dram_usable_bytes: int
    layers: tuple[LayerPlan, ...]
    resources: Resources
    kernel: Configuration
    reasons: tuple[str, ...]

    @property
    def ddr_saturated(self) -> bool:
        """Whether the lanes take at least what the card's DDR was measured to give."""
        taken = self.lanes / beat_lanes(self.precision) * BEAT_BYTES * self.request.card.clock_hz
        return taken >= self.request.card.dram_rate

    @property
    def token_s(self) -> float:
        """Seconds that all layers of one token take, one after the other."""
        return sum(layer.time_s for layer in self.layers)

    @property
    def bottleneck(self) -> str:
        """The part that sets most of a token's time."""
        total: dict[str, float] = {}
        for layer in self.layers:
            total[layer.bottleneck] = total.get(layer.bottleneck, 0.0) + layer.time_s
        return max(total, key=lambda part: total[part])


def plan(request: Request) -> Plan:
    """Return the plan; raises :class:`InvalidInput` with what does not fit and the nearest that does."""
    _check_context(request)
    if request.guarantee and request.precision is Precision.int4:
        raise InvalidInput(
            "guarantee mode needs INT8 keys: INT4 has no useful error bound; use --precision int8"
        )
    if request.precision or request.guarantee:
        precision = request.precision or Precision.int8
        why = "guarantee mode needs its error bound" if request.guarantee else "as asked for"
        return _with(request, precision, f"{precision.upper()}: {why}")
    for precision in Precision:
        if request.lanes == beat_lanes(precision):
            return _with(request, precision, f"{precision.upper()}: that is what {request.lanes} lanes suit")
    # Probed without what the user fixed: lanes of one precision need not suit the other.
    times = {p: _with(replace(request, lanes=None), p, "").token_s for p in Precision}
    gain = times[Precision.int8] / times[Precision.int4]
    if gain < EQUAL_TIME:
        return _with(
            request, Precision.int8, f"INT8: INT4 would be {gain:.2f} times as fast, which is nothing"
        )
    return _with(
        request, Precision.int4, f"INT4: {gain:.1f} times as fast as INT8, and what it swaps has little mass"
    )


def _with(request: Request, precision: Precision, why: str) -> Plan:
    query_bits = 16 if request.guarantee else 8
    kernel = shipped_for(precision, query_bits)
    assert kernel is not None
    lanes = _lanes(request, precision)
    heads = _heads_in_flight(request, kernel)
    vectors = request.model.group if request.reduction is Reduction.max and not request.guarantee else 1
    if vectors > kernel.max_vectors:
        raise InvalidInput(
            f"the maximum over {vectors} query heads does not fit: the kernel takes {kernel.max_vectors} "
            "query vectors; the nearest that does is --reduction sum"
        )
    resources = estimate(precision, lanes, heads, kernel.max_tokens)
    _check_resources(request.card, kernel, resources)
    layers = _layers(request, precision, query_bits, lanes, vectors)
    made = Plan(
        request=request,
        precision=precision,
        query_bits=query_bits,
        lanes=lanes,
        heads_in_flight=heads,
        runs=-(-request.context // kernel.max_tokens),
        dram_usable_bytes=_usable(request.card),
        layers=layers,
        resources=resources,
        kernel=kernel,
        reasons=(),
    )
    return replace(made, reasons=_reasons(made, why, vectors))


def _check_context(request: Request) -> None:
    shape, tokens = request.model.shape, request.context
    if not 1 <= tokens <= LARGEST_CONTEXT:
        nearest = 1 if tokens < 1 else LARGEST_CONTEXT
        raise InvalidInput(
            f"a context of {tokens} tokens cannot be planned; the nearest that can is {nearest}"
        )
    # The cold pool holds every row, and the evaluation keys as well.
    keys = tile_bytes(shape.head_dim, request.precision or Precision.int4) / TILE_TOKENS
    per_token = len(request.model.evaluated) * shape.kv_heads * (shape.row_bytes + keys)
    if tokens * per_token > request.card.nand_bytes:
        nearest = int(request.card.nand_bytes / per_token) // TILE_TOKENS * TILE_TOKENS
        raise InvalidInput(
            f"{tokens} tokens need {format_bytes(int(tokens * per_token))} of the drive's "
            f"{format_bytes(request.card.nand_bytes)}; the nearest that fits is --context {nearest}"
        )


def _lanes(request: Request, precision: Precision) -> int:
    word, card, lanes = beat_lanes(precision), request.card, request.lanes
    if lanes is None or lanes == word:
        return word
    rate = lanes / word * BEAT_BYTES * card.clock_hz
    why = "more than DDR gives" if rate > card.dram_rate else "less than DDR gives"
    raise InvalidInput(
        f"{lanes} lanes do not fit: they take {rate / 1e9:.1f} GB/s of {precision.upper()} keys, {why} "
        f"({card.dram_rate / 1e9:.1f} GB/s); the nearest that fits is --lanes {word}"
    )


def _heads_in_flight(request: Request, kernel: Configuration) -> int:
    heads = request.heads_in_flight
    if heads is None or heads == kernel.heads_in_flight:
        return kernel.heads_in_flight
    each = estimate(kernel.precision, kernel.lanes, 1, kernel.max_tokens).uram
    raise InvalidInput(
        f"no shipped kernel has {heads} heads in flight: each takes {each} of "
        f"{request.card.budget.uram} URAM, and DDR feeds only one; "
        f"the nearest that fits is --heads-in-flight {kernel.heads_in_flight}"
    )


def _check_resources(card: Card, kernel: Configuration, used: Resources) -> None:
    for name in ("lut", "dsp", "ff", "bram36", "uram"):
        spent, has = getattr(used, name), getattr(card.budget, name)
        if spent > has:
            raise InvalidInput(
                f"{kernel.name} needs {spent} {name.upper()}, {card.name} leaves it {has}: use another card"
            )


def _usable(card: Card) -> int:
    return card.dram_bytes - card.dram_reserve_bytes


def _layers(
    request: Request, precision: Precision, query_bits: int, lanes: int, vectors: int
) -> tuple[LayerPlan, ...]:
    model, card = request.model, request.card
    shape = model.shape
    tiles = -(-request.context // TILE_TOKENS)
    # Residency goes by rows of tiles, one tile of each KV head, so that heads stay alike. Every layer gets
    # the same share: NAND streams one part of a layer while DRAM serves the other.
    row = shape.kv_heads * tile_bytes(shape.head_dim, precision)
    rows = min(_usable(card) // row, tiles * len(model.evaluated))
    each, spare = divmod(rows, len(model.evaluated))
    # Guarantee mode scans the keys of a KV head once for each query head.
    scans = model.group if request.guarantee else 1
    heads = shape.kv_heads * scans
    chosen = request.budget.of(request.context)
    results = heads * ((-(-chosen // PAIRS_A_WORD) + 1) * BEAT_BYTES + HISTOGRAM_BYTES)
    query = heads * (OFFSET_BYTES + vectors * shape.head_dim * query_bits // 8)
    cycles = (
        heads * tiles * beats_of_tile(shape.head_dim, precision) * vectors * beat_lanes(precision) / lanes
    )
    planned = []
    for index, layer in enumerate(model.evaluated):
        resident = (each + (index < spare)) * row
        streamed = tiles * row - resident
        # What streams is written to FPGA DRAM before the kernel reads it there.
        dram = tiles * row * scans + streamed + results
        planned.append(
            LayerPlan(
                layer=layer,
                key_bytes=tiles * row,
                dram_bytes=resident,
                nand_bytes=streamed,
                seconds={
                    "NAND": streamed / card.nand_rate,
                    "DRAM": dram / card.dram_rate,
                    "compute": cycles / card.clock_hz,
                    "link": query / card.link_to_card + results / card.link_to_host,
                },
            )
        )
    return tuple(planned)


def _reasons(made: Plan, why: str, vectors: int) -> tuple[str, ...]:
    request, card = made.request, made.request.card
    peak = BEAT_BYTES * card.clock_hz
    keys = sum(layer.key_bytes for layer in made.layers)
    more = (
        f"with {vectors} query vectors in turn it is the kernel that sets the time"
        if made.bottleneck == "compute"
        else "more lanes would add nothing"
    )
    reasons = [
        why,
        f"{made.lanes} lanes: {BEAT_BYTES} bytes a cycle at {card.clock_hz / 1e6:.0f} MHz are "
        f"{peak / 1e9:.1f} GB/s; at that the DDR is already saturated ({card.dram_peak / 1e9:.1f} GB/s peak, "
        f"{card.dram_rate / 1e9:.1f} measured by its vendor), so {more}",
        f"{made.heads_in_flight} heads in flight: one is scanned while the winners of the other are chosen; "
        "a third would wait",
    ]
    if keys <= made.dram_usable_bytes:
        reasons.append("every evaluation key fits the FPGA DRAM: nothing streams from NAND")
    else:
        reasons.append(
            f"evaluation keys need {format_bytes(keys)}, the FPGA DRAM has "
            f"{format_bytes(made.dram_usable_bytes)} for them: each layer keeps the same share there and "
            "streams the rest, so that both work at once"
        )
    if vectors > 1:
        reasons.append(
            f"the maximum scans {vectors} query vectors one after the other; --reduction sum needs one"
        )
    if made.runs > 1:
        reasons.append(
            f"{made.runs} runs of each head: one holds {made.kernel.max_tokens} scores; the host merges them"
        )
    positions = request.model.positions
    if positions is not None and request.context > positions:
        reasons.append(f"the model was made for {positions} positions, fewer than this context")
    return tuple(reasons)
