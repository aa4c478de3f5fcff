"""Token rows and what is told about a set of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """One training sequence. `trained[i]`: token i is learned; `ends`: the last learned one is an end token.

    Shapes: input_ids int32 [tokens], trained bool [tokens].
    """

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    line: int | None
    ends: bool
    boundary_merge: bool = False
    continues_prompt: bool = True

    def __len__(self) -> int:
        return len(self.input_ids)

    def cut(self, start: int, stop: int) -> EncodedRow:
        """Tokens start..stop; without the row's last token it has lost its end."""
        ends = self.ends and stop >= len(self)
        return replace(self, input_ids=self.input_ids[start:stop], trained=self.trained[start:stop], ends=ends)


@dataclass(frozen=True)
class EncodedCounts:
    """Tokens are of the rows that are kept. `without_end` counts rows whose last trained token is no end token."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    emptied: int = 0
    boundary_merges: int = 0
    without_end: int = 0
    other_opening: int = 0
    special_text: int = 0
    glued: int = 0

    def notes(self) -> tuple[str, ...]:
        """Everything of this that a user has to be told, as sentences."""
        told = (
            (self.dropped, "left out: longer than max_length (overlong: drop)"),
            (self.truncated, "cut at max_length: they lost their end and their end token (overlong: truncate)"),
            (self.emptied, "left out: nothing trained was left after the cut at max_length"),
            (self.split, "cut into pieces of max_length (overlong: split)"),
            (
                self.boundary_merges,
                "the prompt ends inside a token, which is trained; move the trailing space into the completion",
            ),
            (self.glued, "no white space between prompt and completion: they are joined as they stand"),
            (self.without_end, "no end token is trained at the end: the model does not learn there to stop"),
            (self.other_opening, "the template opens a trained answer in another way than its generation prompt"),
            (self.special_text, "the text holds the name of a special token; in a message it is read as plain text"),
        )
        return tuple(f"{_rows(count)}: {what}" for count, what in told if count)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


@dataclass(frozen=True, eq=False)
class EncodedSet:
    """The rows to train, in the order of the rows they came from."""

    rows: tuple[EncodedRow, ...]
    counts: EncodedCounts
    notes: tuple[str, ...] = ()
