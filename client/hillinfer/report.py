"""What a run gives back, as JSON and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hillinfer_core.units import format_bytes


@dataclass(frozen=True)
class Answer:
    """One question's answer. Times in seconds.

    ttft_s: from asking to the first token. decode_tokens_per_s: of the tokens
    after the first, None when there is none.
    """

    question: str
    text: str
    new_tokens: int
    ttft_s: float
    decode_tokens_per_s: float | None


@dataclass(frozen=True)
class SplitUse:
    """How the ranking was split. cpu_share: of all tokens ranked, the CPU's, 0 to 1.

    imbalance: |T_cpu - T_drive| of the larger, median over the layers of the latest rankings; None if both
    never worked at once. boundaries: layers by why their boundary is where it is.
    """

    cpu_share: float
    imbalance: float | None
    boundaries: Mapping[str, int]


@dataclass(frozen=True)
class KvUse:
    """Bytes of KV held and moved. hot_hit_rate: 0 to 1, None before anything was selected.

    predictors: layers by the query that ranked them last. hidden_share: of the time
    of evaluation and fetch, 0 to 1, what nobody waited for; None before any.
    split: between CPU and drive, None if it was not asked for.
    """

    full_bytes: int
    resident_peak_bytes: int
    resident: Mapping[str, int]
    cold_written_bytes: int
    cold_read_bytes: int
    evaluated_bytes: int
    hot_hit_rate: float | None
    predictors: Mapping[str, int] = field(default_factory=dict)
    hidden_share: float | None = None
    split: SplitUse | None = None


@dataclass(frozen=True)
class MassReport:
    """What decode steps under `min_mass` held of the attention.

    kind: "bound" where the shares are proven, "estimate" where the keys are INT4
    or the query predicted. least, mean: over steps and layers, of the worst query
    head; None before the first step. attended: tokens, mean over the steps of each
    layer; whole: share of each layer's steps that attended to every token.
    """

    target: float
    kind: str
    least: float | None
    mean: float | None
    attended: tuple[float, ...]
    whole: tuple[float, ...]


@dataclass(frozen=True)
class RunReport:
    """A whole run: the context read once, the answers in the order of the questions. Times in seconds.

    restored: whether the context was found under `context_name` and not read.
    notes: what there was to say about the name. prefill_s: until the context
    was there, read (and saved) or restored. time_to_first_answer_s: the same and
    the first question, until the first token of its answer. total_s: of all the
    work, loading the model included. mass: None unless a share was asked for.
    """

    model: str
    context_tokens: int
    context_name: str | None
    restored: bool
    notes: tuple[str, ...]
    prefill_s: float
    time_to_first_answer_s: float
    total_s: float
    answers: tuple[Answer, ...]
    kv: KvUse
    mass: MassReport | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return asdict(self)

    def summary(self) -> str:
        """Return the lines that follow the answers."""
        kv = self.kv
        rates = [answer.decode_tokens_per_s for answer in self.answers if answer.decode_tokens_per_s]
        decode = f"{sum(rates) / len(rates):.1f} tokens/s" if rates else "-"
        share = f" ({kv.resident_peak_bytes / kv.full_bytes:.0%} of it)" if kv.full_bytes else ""
        hits = "-" if kv.hot_hit_rate is None else f"{kv.hot_hit_rate:.1%}"
        speed = f"{self.prefill_s:.1f} s ({self.context_tokens / self.prefill_s:,.0f} tokens/s)"
        prefill = f"skipped, {self.context_name} was saved" if self.restored else speed
        rows = [
            ("context", f"{self.context_tokens:,} tokens"),
            ("prefill", prefill),
            ("first answer", f"after {self.time_to_first_answer_s:.2f} s"),
            ("decode", decode),
            ("full KV", format_bytes(kv.full_bytes)),
            ("resident, peak", format_bytes(kv.resident_peak_bytes) + share),
            *((f"  {kind.replace('_', ' ')}", format_bytes(size)) for kind, size in kv.resident.items()),
            ("cold pool written", format_bytes(kv.cold_written_bytes)),
            ("cold pool read", format_bytes(kv.cold_read_bytes)),
            ("keys evaluated", format_bytes(kv.evaluated_bytes)),
            ("hot hit rate", hits),
            ("ranked by", ", ".join(f"{name} in {count}" for name, count in kv.predictors.items()) or "-"),
            ("evaluation hidden", "-" if kv.hidden_share is None else f"{kv.hidden_share:.0%}"),
            *(() if kv.split is None else [("ranked by the CPU", _split_told(kv.split))]),
            *(() if self.mass is None else _mass_rows(self.mass)),
        ]
        return "\n".join(f"{name:<20}{value}" for name, value in rows)


def _split_told(split: SplitUse) -> str:
    stops = ", ".join(f"{stop} in {count}" for stop, count in split.boundaries.items())
    differ = "" if split.imbalance is None else f"; times differ by {split.imbalance:.0%}"
    return f"{split.cpu_share:.0%} of the tokens{differ}; boundary {stops}"


def _mass_rows(mass: MassReport) -> list[tuple[str, str]]:
    if mass.least is None or mass.mean is None:
        return [("attention held", "no step selected")]
    # Rounded down: what is printed must hold too.
    least = f"{int(mass.least * 1000) / 10:.1f}%"
    told = f"at least {least}" if mass.kind == "bound" else f"about {least} or more, an estimate"
    attended = " ".join(f"{tokens:,.0f}" for tokens in mass.attended)
    return [
        ("attention held", f"{told}, {mass.mean:.1%} on average (asked for {mass.target:.1%})"),
        ("attended, by layer", attended),
    ]
