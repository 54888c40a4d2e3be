"""Numbers in words for people: counts that agree with their nouns, durations, and sizes."""

from __future__ import annotations

from collections.abc import Mapping


def describe_count(count: float, noun: str) -> str:
    """Returns a number with its noun: `1 node`, `2,000 nodes`."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}" if count == 1 else f"{number} {noun}s"


def describe_counts(counts: Mapping[str, int]) -> str:
    """Returns several counts in their order: `2,000 timeout, 1 too_large`; empty for none."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def describe_duration(seconds: float) -> str:
    """Returns a duration in its two largest units: `45 s`, `12 min 30 s`, `3 h 20 min`, `2 d 4 h`."""
    whole = max(0, round(seconds))
    units = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((place for place, (count, _) in enumerate(units) if count), len(units) - 1)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2] if count) or "0 s"


def describe_gb(size: int) -> str:
    """Returns a number of bytes in GB (10^9 bytes): `1.5 GB`."""
    return f"{size / 1e9:,.1f} GB"
