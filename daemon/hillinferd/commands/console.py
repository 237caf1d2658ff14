"""Where tables are printed."""

from __future__ import annotations

import os

from rich.console import Console

WIDTH = 140
"""Columns of a table that goes to a file or a pipe, where none is too narrow. Our choice."""


def wide_console() -> Console:
    """Return the terminal, or what stands in its place, which then has :data:`WIDTH` columns."""
    console = Console(markup=False, highlight=False)
    known = console.is_terminal or "COLUMNS" in os.environ
    return console if known else Console(markup=False, highlight=False, width=WIDTH)
