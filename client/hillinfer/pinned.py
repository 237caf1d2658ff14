"""How many tokens a step attends to without ranking them: the first ones, and the latest."""

from __future__ import annotations

from hillinfer_core.errors import BudgetTooSmall

SINKS, RECENT = 4, 32
"""Tokens pinned where a budget has room for as many again: our choice, which most figures of docs/ are of."""


LEAST_BY_SHARE = 2 * (SINKS + RECENT)
"""Tokens that a per cent means at least, where nobody knows how long a context will be: their number counts.
Of four questions about 512 tokens the bundled model answers one by the pinned ones alone, all by these."""


def pinned_within(budget: int, append_unit: int) -> tuple[int, int]:
    """Return (sinks, recent) for a budget of `budget` tokens: half of it at most, as far as that can be.

    append_unit: of the rows, see `Shape.append_unit`. The window is not shorter: tokens are ranked once they
    are appended, and one that is neither ranked nor in the window is attended to by no step.
    Raises BudgetTooSmall where that and one sink leave nothing to select.
    """
    least = 1 + append_unit + 1
    if budget < least:
        raise BudgetTooSmall(
            f"a budget of {budget} tokens is too small, as the latest {append_unit} and the first are always "
            f"attended: give {least} tokens or more"
        )
    half = budget // 2
    sinks = min(SINKS, max(1, half - append_unit))
    return sinks, max(append_unit, min(RECENT, half - sinks))
