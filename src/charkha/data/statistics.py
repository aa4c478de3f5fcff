"""How long rows are in tokens, how much of them is trained, and what each script costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from charkha.data.scripts import OTHER

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99)
_COSTLY_TOKENS_A_BYTE = 0.5  # half of what a tokenizer that knows nothing but bytes needs


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of some rows, end tokens included. `trained` are those that are learned.

    Percentiles are lengths that occur. `histogram` pairs an upper bound (a power of two) with the rows up to it and
    beyond the bound before. `over_max_length` is None where no limit was named.
    """

    total: int
    trained: int
    trained_share: float
    shortest: int
    median: int
    p95: int
    longest: int
    percentiles: dict[str, int]
    histogram: tuple[tuple[int, int], ...]
    max_length: int | None = None
    over_max_length: int | None = None
    over_max_length_share: float | None = None


@dataclass(frozen=True)
class ScriptCounts:
    """Rows mostly written in one script. Bytes are of UTF-8; tokens are None without a tokenizer."""

    rows: int
    characters: int
    bytes: int
    tokens: int | None
    tokens_per_byte: float | None
    tokens_per_character: float | None


def token_counts(lengths: NDArray[np.int64], trained: int, max_length: int | None = None) -> TokenCounts:
    """Statistics of the lengths of at least one row."""
    ordered = np.sort(lengths)
    last = len(ordered) - 1
    total = int(ordered.sum())
    over = None if max_length is None else int((ordered > max_length).sum())
    return TokenCounts(
        total=total,
        trained=trained,
        trained_share=round(trained / max(total, 1), 4),
        shortest=int(ordered[0]),
        median=int(ordered[last // 2]),
        p95=int(ordered[round(last * 0.95)]),
        longest=int(ordered[-1]),
        percentiles={f"p{share}": int(ordered[round(last * share / 100)]) for share in _PERCENTILES},
        histogram=_histogram(ordered),
        max_length=max_length,
        over_max_length=over,
        over_max_length_share=None if over is None else round(over / len(ordered), 6),
    )


def _histogram(ordered: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    bounds = [16]
    while bounds[-1] < ordered[-1]:
        bounds.append(bounds[-1] * 2)
    reached = np.searchsorted(ordered, bounds, side="right")
    counts = np.diff(reached, prepend=0)
    return tuple((bound, int(count)) for bound, count in zip(bounds, counts, strict=True))


class ScriptTally:
    """Rows, characters, bytes and tokens by script, summed up block by block."""

    def __init__(self) -> None:
        self._sums: dict[str, list[int]] = {}

    def add(self, script: str, rows: int, characters: int, bytes_: int, tokens: int) -> None:
        """Takes in some rows of one script."""
        sums = self._sums.setdefault(script, [0, 0, 0, 0])
        for index, value in enumerate((rows, characters, bytes_, tokens)):
            sums[index] += value

    def merge(self, sums: Mapping[str, tuple[int, int, int, int]]) -> None:
        """Takes in the sums of another tally."""
        for script, values in sums.items():
            self.add(script, *values)

    def sums(self) -> dict[str, tuple[int, int, int, int]]:
        """(rows, characters, bytes, tokens) of each script."""
        return {script: (values[0], values[1], values[2], values[3]) for script, values in self._sums.items()}

    def counts(self, has_tokens: bool) -> dict[str, ScriptCounts]:
        """By script, most bytes first."""
        ordered = sorted(self._sums.items(), key=lambda item: -item[1][2])
        return {script: _script_counts(values, has_tokens) for script, values in ordered}


def _script_counts(values: list[int], has_tokens: bool) -> ScriptCounts:
    rows, characters, bytes_, tokens = values
    if not has_tokens:
        return ScriptCounts(rows, characters, bytes_, None, None, None)
    return ScriptCounts(
        rows, characters, bytes_, tokens, round(tokens / max(bytes_, 1), 4), round(tokens / max(characters, 1), 4)
    )


def costly_scripts(counts: Mapping[str, ScriptCounts]) -> tuple[str, ...]:
    """A warning for each script that the tokenizer breaks into little more than bytes."""
    told: list[str] = []
    for script, found in counts.items():
        cost = found.tokens_per_byte
        if cost is None or script in ("Latin", OTHER) or cost < _COSTLY_TOKENS_A_BYTE:
            continue
        told.append(
            f"{script}: {found.tokens_per_character:.2g} tokens a character ({cost:.2g} a byte): the tokenizer falls "
            "back to bytes; a base whose tokenizer knows the script trains and answers several times as fast"
        )
    return tuple(told)
