"""What a file reader hands on: values with the line they stood on, before anyone asks what they mean.

A file arrives as blocks of about a mebibyte, so that memory does not grow with the file. A block that is still raw is
parsed by whoever needs it, in this process or another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from charkha.errors import Problem


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON value, table row or paragraph. `line` counts from 1; in Parquet and Arrow it is the row number."""

    value: object
    line: int


@dataclass(frozen=True, slots=True)
class ParsedBlock:
    """Some records of a file, in its order. `blank` counts lines that hold no row."""

    records: tuple[Record, ...]
    problems: tuple[Problem, ...] = ()
    blank: int = 0

    def parse(self) -> ParsedBlock:
        """The block itself."""
        return self


@dataclass(frozen=True, slots=True)
class LineBlock:
    """Whole lines in UTF-8, cut out of a file but not yet looked at. `first_byte` is where they stand in the file."""

    data: bytes
    first_line: int
    first_byte: int
    parser: Callable[[LineBlock], ParsedBlock]

    def parse(self) -> ParsedBlock:
        """The records of these lines."""
        return self.parser(self)


class Block(Protocol):
    """A part of a file that can be sent to another process and parsed there."""

    def parse(self) -> ParsedBlock:
        """Its records, problems and blank lines."""


@dataclass(frozen=True)
class OpenFile:
    """A file that is being read. `encoding` is None for binary files; `blocks` can be gone through once."""

    kind: str
    encoding: str | None
    blocks: Iterator[Block]
    notes: tuple[str, ...] = ()


def blank_lines_note(count: int) -> tuple[str, ...]:
    """The note about lines that hold no row; nothing is left out of a file without being told."""
    if count == 0:
        return ()
    return ("1 blank line was skipped",) if count == 1 else (f"{count} blank lines were skipped",)
