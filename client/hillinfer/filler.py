"""Real text of any length without shipping any: the standard library's own sources."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from hillinfer_core.errors import InvalidInput

CHARS_PER_TOKEN = 8
"""More characters than any usual tokeniser packs into one token of source code."""


class Tokenizer(Protocol):
    """The one call that is needed of a transformers (fast) tokeniser."""

    def __call__(
        self, text: str, *, return_offsets_mapping: bool, add_special_tokens: bool
    ) -> Mapping[str, Any]:
        """Return `input_ids` and `offset_mapping` (first and end character of each token)."""


def source_files(seed: int) -> list[Path]:
    """Return the public top-level modules of the running interpreter, in an order fixed by `seed`."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    random.Random(seed).shuffle(files)
    return files


def lines_of_source(seed: int) -> Iterator[str]:
    """Yield lines with their newline; undecodable bytes are replaced."""
    for path in source_files(seed):
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)


def filler_lines(tokenizer: Tokenizer, tokens: int, seed: int = 0) -> list[str]:
    """Return whole lines that together come to `tokens` tokens or at most one line more.

    Raises InvalidInput where the interpreter's sources are missing or too short.
    """
    lines: list[str] = []
    characters = 0
    for line in lines_of_source(seed):
        lines.append(line)
        characters += len(line)
        if characters >= tokens * CHARS_PER_TOKEN:
            break
    encoded = tokenizer("".join(lines), return_offsets_mapping=True, add_special_tokens=False)
    ends = [end for _, end in encoded["offset_mapping"]]
    if len(ends) < tokens:
        raise InvalidInput(
            f"the standard library's sources give {len(ends)} tokens, {tokens} are wanted: ask for fewer"
        )
    wanted = ends[tokens - 1] if tokens else 0
    position = 0
    for count, line in enumerate(lines):
        if position >= wanted:
            return lines[:count]
        position += len(line)
    return lines
