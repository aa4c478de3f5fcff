"""Numbers with units as text, and text as numbers with units."""

from __future__ import annotations

import math
import re

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_SECONDS_PER = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}
_BYTES_PER = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
              "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


def format_bytes(count: float) -> str:
    """`1536` -> `1.5 KiB`; three significant digits."""
    magnitude = abs(float(count))
    power = 0
    while magnitude >= 1024 and power < len(_BINARY) - 1:
        magnitude /= 1024
        power += 1
    if power == 0:
        return f"{int(count)} B"
    value = math.copysign(magnitude, count)
    digits = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2
    return (
        f"{value:.{digits}f}".rstrip("0").rstrip(".") + f" {_BINARY[power]}"
        if digits
        else f"{value:.0f} {_BINARY[power]}"
    )


def format_seconds(seconds: float) -> str:
    """`75` -> `1 min 15 s`; the two largest units, below ten seconds one decimal."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, below, below_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = (whole % size) // below
            return f"{whole // size} {name} {rest} {below_name}" if rest else f"{whole // size} {name}"
    return f"{whole} s"


def format_count(count: float) -> str:
    """`1234567` -> `1.23 M`: parameters and tokens in the decimal thousands that the field uses."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:g}"


def parse_seconds(text: str) -> float:
    """`"5min"`, `"300s"`, `"1.5 h"` -> seconds. Raises ValueError naming the units known."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if match is None or match[2] not in _SECONDS_PER:
        raise ValueError(f"{text!r} is not a duration; write for example 300s, 5min or 1h")
    return float(match[1]) * _SECONDS_PER[match[2]]


def parse_bytes(text: str) -> int:
    """`"24GB"` -> 24e9, `"24 GiB"` -> 24 * 2**30. Raises ValueError naming the units known."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if match is None or match[2] not in _BYTES_PER:
        raise ValueError(f"{text!r} is not a size; write for example 24GiB or 500MB")
    return int(float(match[1]) * _BYTES_PER[match[2]])
