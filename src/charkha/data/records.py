"""What a file reader hands on: values with the line they stood on, before anyone asks what they mean."""

from __future__ import annotations

from dataclasses import dataclass

from charkha.errors import Problem


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON value, table row or paragraph. `line` counts from 1; in Parquet it is the row number."""

    value: object
    line: int


@dataclass(frozen=True)
class FileRecords:
    """Everything one file gave. `encoding` is None for binary files."""

    kind: str
    encoding: str | None
    records: tuple[Record, ...]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def blank_lines_note(count: int) -> tuple[str, ...]:
    """The note about lines that hold no row; nothing is left out of a file without being told."""
    if count == 0:
        return ()
    return ("1 blank line was skipped",) if count == 1 else (f"{count} blank lines were skipped",)
