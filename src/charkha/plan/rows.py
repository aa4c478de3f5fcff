"""What a plan knows of the training rows: finished ones, or only how many there are, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rows:
    """Lengths in tokens; rows that are packed are counted as packed rows."""

    longest: int
    mean: float
    count: int | None
    trained_positions: Mapping[int, int] = field(default_factory=dict)  # of the longest micro batch, by its rows
    known: bool = False  # whether lengths were counted, not taken as max_length
    packed: bool = False
    lengths: Any = field(default=None, compare=False, repr=False)  # int64 [documents], where they were counted
    fingerprint: str = ""  # of the documents, which decides their order
