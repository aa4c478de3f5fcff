"""What happens to rows longer than `max_length`: refused, left out, cut or split, and always counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from charkha.data.encoded import EncodedRow
from charkha.data.rows import Row, TextRow
from charkha.errors import Problem

Overlong = Literal["error", "drop", "split", "truncate"]


@dataclass(frozen=True)
class Fitted:
    """What became of one row. `fate` is None for a row that fits."""

    rows: tuple[EncodedRow, ...] = ()
    fate: Literal["dropped", "truncated", "split", "emptied"] | None = None
    problem: Problem | None = None


def fit_row(encoded: EncodedRow, row: Row, max_length: int | None, overlong: Overlong) -> Fitted:
    """The row within `max_length` tokens.

    `truncate` keeps the start: the row loses its end token. `split` cuts text rows into pieces, of which only the first
    has the begin token and only the last the end token; conversations and prompts cannot be split.
    """
    if not encoded.trained.any():
        return Fitted(problem=Problem("nothing to train: no token of the row is trained", row.line))
    if max_length is None or len(encoded) <= max_length:
        return Fitted((encoded,))
    if overlong == "drop":
        return Fitted(fate="dropped")
    if overlong == "truncate":
        cut = encoded.cut(0, max_length)
        return Fitted((cut,), "truncated") if cut.trained.any() else Fitted(fate="emptied")
    if overlong == "split" and isinstance(row, TextRow):
        starts = range(0, len(encoded), max_length)
        return Fitted(tuple(encoded.cut(start, min(start + max_length, len(encoded))) for start in starts), "split")
    return Fitted(problem=Problem(_too_long(len(encoded), max_length, overlong), row.line))


def _too_long(tokens: int, max_length: int, overlong: Overlong) -> str:
    reason = f"too long: {tokens} tokens, max_length is {max_length}"
    return f"{reason}; only text rows can be split" if overlong == "split" else reason
