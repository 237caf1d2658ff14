"""Sizes and budgets as people write them: ``64MiB``, ``2%``, ``256``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import InvalidInput

_BINARY = ("KiB", "MiB", "GiB", "TiB")
_FACTORS = {"": 1, "b": 1}
for _power, _unit in enumerate(_BINARY, start=1):
    _FACTORS[_unit.lower()] = 1024**_power
    _FACTORS[_unit[0].lower() + "b"] = 1000**_power

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def parse_bytes(value: str | int) -> int:
    """Return a size in bytes from a count or a text such as ``64MiB``, ``1.5GiB``, ``10MB`` or ``4096``.

    Units are not case-sensitive. Raises :class:`InvalidInput` for anything else, negative sizes included.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise InvalidInput(f"a size cannot be negative: {value}")
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise InvalidInput(f"not a size: {value!r}; write a number of bytes or a unit, for example 64MiB")
    # Whole numbers stay integers: a float would round sizes above 2**53.
    return int(match[1]) * factor if match[1].isdigit() else round(float(match[1]) * factor)


def format_bytes(nbytes: int) -> str:
    """Return ``nbytes`` with a binary unit and at most one decimal, for example ``1.5 MiB``."""
    if nbytes < 1024:
        return f"{nbytes} B"
    size = float(nbytes)
    for unit in _BINARY:
        size /= 1024
        if size < 1023.95 or unit == _BINARY[-1]:
            break
    return f"{size:.1f} {unit}"


@dataclass(frozen=True)
class Budget:
    """Tokens attended in each step: a count (``tokens``) or a fraction of the past (``alpha``), not both."""

    tokens: int | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.alpha is None):
            raise InvalidInput("a budget is either a number of tokens or a per cent of the past")
        if self.tokens is not None and self.tokens < 1:
            raise InvalidInput(f"a budget must be at least 1 token, not {self.tokens}")
        if self.alpha is not None and not 0.0 < self.alpha <= 1.0:
            raise InvalidInput(f"a budget must be above 0% and at most 100%, not {self.alpha * 100:g}%")

    def of(self, past_tokens: int) -> int:
        """Return the tokens to attend, 0 to ``past_tokens``, of a past that long; fractions round up."""
        if self.tokens is not None:
            return min(self.tokens, past_tokens)
        assert self.alpha is not None
        # The rounding keeps 0.07 * 100 from becoming 8.
        return min(math.ceil(round(self.alpha * past_tokens, 6)), past_tokens)

    def __str__(self) -> str:
        return f"{self.tokens}" if self.alpha is None else f"{self.alpha * 100:g}%"


def parse_budget(value: str | int | Budget) -> Budget:
    """Return a :class:`Budget` from a count (``256`` or ``"256"``) or a per cent (``"2%"``).

    Raises :class:`InvalidInput` for anything else.
    """
    if isinstance(value, Budget):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Budget(tokens=value)
    text = value.strip() if isinstance(value, str) else ""
    if text.endswith("%") and _NUMBER.fullmatch(text[:-1].strip()):
        return Budget(alpha=float(text[:-1]) / 100)
    if text.isdigit() and text.isascii():
        return Budget(tokens=int(text))
    raise InvalidInput(
        f"not a budget: {value!r}; write a number of tokens (256) or a per cent of the past (2%)"
    )
