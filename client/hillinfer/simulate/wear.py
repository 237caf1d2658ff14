"""What a month of use writes to NAND."""

from __future__ import annotations

from typing import Any

from hillinfer.simulate.workload import Model

QUESTIONS, ANSWER = 200, 300
"""A day's questions and the tokens of an answer. Our choice: a heavy day of one person."""

CONTEXTS, CONTEXT_TOKENS = 10, 131_072
"""New texts read in a day, and their tokens. Our choice."""

KEY_BITS = 4

CAPACITY = 3.84e12
"""Of the SmartSSD, bytes: vendor documents."""

ENDURANCE: float | None = None
"""Rated drive writes a day of the SmartSSD: unknown, no source was at hand."""

PM983_DWPD = 1.3
"""Of the PM983 of the same capacity, for 3 years: Samsung's datasheet, rev. 1.0. Another drive: for scale."""


def month(model: Model) -> dict[str, Any]:
    """Return bytes written by the host in a day and a month of 30 days.

    Rows are written once, in whole pages, with evaluation keys beside; demotion writes nothing. What the
    drive writes besides (write amplification) is unknown; large contiguous extents keep it low.
    """
    row = 2 * model.kv_heads * model.head_dim * 2
    keys = model.kv_heads * model.head_dim * KEY_BITS // 8
    token = model.layers * (row + keys)
    day = token * (CONTEXTS * CONTEXT_TOKENS + QUESTIONS * ANSWER)
    return {
        "model": model.name,
        "bytes_per_token": token,
        "bytes_per_day": day,
        "bytes_per_month": 30 * day,
        "drive_writes_per_day": day / CAPACITY,
        "rated_drive_writes_per_day": ENDURANCE,
        "share_of_pm983_rating": day / CAPACITY / PM983_DWPD,
        "write_amplification": None,
    }
