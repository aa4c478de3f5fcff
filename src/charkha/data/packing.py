"""Several documents in one row, planned ahead: which lengths share a row is fixed, which documents fill them is not.

Best-fit-decreasing over the histogram of lengths, as in Krell et al., "Efficient Sequence Packing without
Cross-contamination" (arXiv 2107.02027): rows of one length are interchangeable, so the work depends on the number of
different lengths and not on the number of documents. The number of packed rows is then the same in every epoch, which
makes the number of optimizer steps known before the first; each epoch deals other documents of the same length into
the same places. No document is cut, dropped or repeated.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from charkha.data.order import permutation, random_bits
from charkha.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class PackedShapes:
    """How long the documents in every packed row are; the same for all epochs.

    `slots` int64 [documents]: their lengths in tokens, row by row; `offsets` int64 [rows + 1]: where a row begins.
    """

    row_tokens: int  # room of one row
    slots: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @property
    def rows(self) -> int:
        """Number of packed rows."""
        return len(self.offsets) - 1

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Tokens of the documents of each packed row, int64 [rows]."""
        return np.add.reduceat(self.slots, self.offsets[:-1])

    @property
    def fill_rate(self) -> float:
        """Share of the room that documents take, from 0 to 1."""
        return float(self.slots.sum() / (self.rows * self.row_tokens))

    def deal(self, lengths: NDArray[np.int64], *, seed: int, epoch: int, fingerprint: str) -> list[NDArray[np.int64]]:
        """Per packed row the numbers of its documents: a pure function of its arguments.

        `lengths` are those the shapes were made from. Every document stands in exactly one row.
        """
        shuffled = permutation(len(lengths), random_bits(seed, epoch, f"packing {fingerprint}"))
        dealt = np.empty_like(shuffled)
        # Both sides sorted by length: the n-th place of a length takes the n-th shuffled document of that length.
        by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
        dealt[np.argsort(self.slots, kind="stable")] = by_length
        return [dealt[start:end] for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True)]


def pack(lengths: NDArray[np.int64], row_tokens: int) -> PackedShapes:
    """Shapes of rows of at most `row_tokens` tokens that hold every document once; depends on the lengths alone.

    Raises DataError for no documents, for an empty one, and for one longer than a row.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths) or lengths.min() < 1:
        raise DataError("there are no rows to pack, or empty ones")
    if lengths.max() > row_tokens:
        message = f"a row of {lengths.max()} tokens does not fit in a packed row of {row_tokens}"
        raise DataError(message, remedy="raise data.max_length, or set data.packing: false")
    slots: list[int] = []
    ends = [0]
    for group in _best_fit_decreasing(lengths, row_tokens):
        contents = [length for length, count in group.contents for _ in range(count)]
        slots += contents * group.rows
        ends += [ends[-1] + len(contents) * (number + 1) for number in range(group.rows)]
    return PackedShapes(row_tokens, np.array(slots, dtype=np.int64), np.array(ends, dtype=np.int64))


@dataclass(frozen=True)
class _Group:
    """`rows` packed rows that hold the same: (length, how many) pairs, longest first, and `room` tokens left."""

    rows: int
    room: int
    contents: tuple[tuple[int, int], ...]

    def with_more(self, rows: int, length: int, count: int) -> _Group:
        return _Group(rows, self.room - length * count, (*self.contents, (length, count)))


def _best_fit_decreasing(lengths: NDArray[np.int64], row_tokens: int) -> list[_Group]:
    """Each length, longest first, goes where least room is left over; a row takes as many of it as fit.

    That is what best fit does with one document at a time too: the row it has just chosen is the tightest next time.
    """
    by_room: dict[int, list[_Group]] = defaultdict(list)
    rooms: list[int] = []  # the keys of by_room, sorted

    def keep(group: _Group) -> None:
        if group.rows:
            if group.room not in by_room:
                insort(rooms, group.room)
            by_room[group.room].append(group)

    for length, count in _histogram(lengths):
        while count:
            place = bisect_left(rooms, length)
            if place == len(rooms):
                keep(_Group(-(-count // (row_tokens // length)), row_tokens, ()))
                continue
            room = rooms[place]
            group = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
            fit = room // length
            whole = min(group.rows, count // fit)
            rest = count - whole * fit if whole < group.rows else 0  # fewer than fit: one more row takes them
            keep(group.with_more(whole, length, fit))
            if rest:
                keep(group.with_more(1, length, rest))
            keep(_Group(group.rows - whole - bool(rest), room, group.contents))
            count -= whole * fit + rest
    return [group for room in rooms for group in by_room[room]]


def _histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(length, how many), longest first."""
    values, counts = np.unique(lengths, return_counts=True)
    return [(int(value), int(count)) for value, count in zip(values[::-1], counts[::-1], strict=True)]
