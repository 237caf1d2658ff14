"""Which segments of evaluation keys a scan looks at."""

from __future__ import annotations

from .contract import KeySegment, Scan


def overlapping(scan: Scan) -> list[KeySegment]:
    """Return the segments that hold tokens of the scan; raises ``ValueError`` if some token is in none."""
    if scan.first >= scan.end:
        return []
    found = [item for item in scan.segments if item.first_token < scan.end and item.end_token > scan.first]
    reached = scan.first
    for segment in found:
        if segment.first_token > reached:
            break
        reached = segment.end_token
    if reached < scan.end:
        raise ValueError(f"no segment holds token {reached} of a scan of {scan.first} to {scan.end}")
    return found
