"""The tables of docs/simulation.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hillinfer.simulate.systems import System

Told = dict[str, Any]
_OTHERS = [system.value for system in System if system is not System.hillinfer]


def as_markdown(told: Told) -> str:
    """Return the tables of what `configurations.paper` or `ours` gives."""
    parts = [f"### Decode steps ({told['config']})", *_steps(told["rows"])]
    if "opt" in told:
        parts += ["", "### OPT-6.7B, 1,920 tokens read and 128 written, seconds in all", *_opt(told["opt"])]
    if "applications" in told:
        parts += [
            "",
            "### Several applications at once, 8B shape, 128K tokens, alpha 2 %",
            *_applications(told),
        ]
    parts += ["", *_sensitivity(told["sensitivity"]), "", *_sweep(told["sweep"])]
    parts += ["", "### key_abstracts at 20 % and hillinfer at 2 %", *_unequal_shares(told["unequal_shares"])]
    if "wear" in told:
        parts += ["", "### A month's wear", *_wear(told["wear"])]
    return "\n".join(parts)


def constants_table(constants: Sequence[Told]) -> str:
    """Return all constants with ranges and sources."""
    body = [
        [f"`{each['name']}`", _figure(each["nominal"]), _figure(each["worst"]), _figure(each["best"]),
         each["unit"], each["source"]]
        for each in constants
    ]  # fmt: skip
    return "\n".join(_table(["constant", "nominal", "worst", "best", "unit", "source"], body))


def _steps(rows: Sequence[Told]) -> list[str]:
    body = []
    for each in rows:
        hillinfer = each["system"] == System.hillinfer
        extra = f"{each['query']}, CPU {each['cpu_share']:.0%}" if hillinfer else ""
        name = f"**{each['system']}**" if hillinfer else each["system"]
        body.append(
            [each["model"], str(each["batch"]), f"{each['tokens']:,}", f"{each['alpha']:.0%}", name,
             each["drive"],
             f"{each['step_ms']:,.0f}", f"{each['speedup_of_hillinfer']:.2f}", f"{each['miss_rate']:.1%}",
             f"{each['moved_bytes'] / 1e9:.2f}", each["bottleneck"], extra]
        )  # fmt: skip
    head = (
        "model,batch,tokens,alpha,system,drive,step ms,hillinfer's speedup,missing,GB from NAND,busiest,APP"
    )
    return _table(head.split(","), body)


def _opt(rows: Sequence[Told]) -> list[str]:
    batches = sorted({each["batch"] for each in rows})
    found = {(each["batch"], each["system"]): each["seconds"] for each in rows}
    names = [system.value for system in System]
    return _table(["batch", *names], [[str(b), *(f"{found[b, n]:.1f}" for n in names)] for b in batches])


def _applications(told: Told) -> list[str]:
    body = [
        [
            str(each["applications"]),
            f"{each['step_ms']:.0f}",
            f"{each['tokens_per_s']:.1f}",
            each["bottleneck"],
        ]
        for each in told["applications"]
    ]
    return _table(["applications", "step ms", "tokens/s together", "busiest"], body)


def _sensitivity(told: Told) -> list[str]:
    of = told["of"]
    title = f"{of['model']}, batch {of['batch']}, {of['tokens']:,} tokens, alpha {of['alpha']:.0%}"
    lines = [f"### Sensitivity: {title}", "", "Each cell: at the constant's worst .. best.", ""]
    body = [["nominal", *(f"{told['nominal'][key]:.2f}" for key in ("step_ms", *_OTHERS))]]
    for each in told["rows"]:
        pairs = [(each["worst"][key], each["best"][key]) for key in ("step_ms", *_OTHERS)]
        body.append([each["constant"], *(f"{worst:.2f} .. {best:.2f}" for worst, best in pairs)])
    return lines + _table(["constant", "step ms", *(f"over {name}" for name in _OTHERS)], body)


def _sweep(told: Told) -> list[str]:
    of, chosen = told["of"], told["chosen"]
    body = [[f"{each['cpu_share']:.0%}", f"{each['step_ms']:.0f}"] for each in told["points"]]
    body.append([f"chosen: {chosen['cpu_share']:.1%}", f"{chosen['step_ms']:.0f}"])
    title = f"### Sweep of the split: {of['model']}, batch {of['batch']}, {of['tokens']:,} tokens"
    return [title, *_table(["ranked by the CPU, whatever memory its keys take", "step ms"], body)]


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _unequal_shares(rows: Sequence[Told]) -> list[str]:
    body = [
        [each["model"], str(each["batch"]), f"{each['tokens']:,}", each["system"], f"{each['alpha']:.0%}",
         f"{each['captured']:.3f}", _share(each["answered"]), f"{each['step_ms']:,.0f}", each["bottleneck"]]
        for each in rows
    ]  # fmt: skip
    return _table(
        ["model", "batch", "tokens", "system", "alpha", "captured", "answered", "step ms", "busiest"], body
    )


def _wear(told: Told) -> list[str]:
    rated = told["rated_drive_writes_per_day"]
    rows = [
        ["written for a token", f"{told['bytes_per_token'] / 1024:.0f} KiB"],
        ["written in a day", f"{told['bytes_per_day'] / 1e9:.0f} GB"],
        ["in a month", f"{told['bytes_per_month'] / 1e12:.2f} TB"],
        ["drive writes a day", f"{told['drive_writes_per_day']:.3f}"],
        ["rated for the SmartSSD", "unknown" if rated is None else f"{rated}"],
        ["share of a PM983's rating", f"{told['share_of_pm983_rating']:.1%}"],
        ["write amplification", "unknown"],
    ]
    return _table(["8B shape", ""], rows)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in body),
    ]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
