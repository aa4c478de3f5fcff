"""CSV, TSV and Parquet to records: one dictionary a row, keyed by column."""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from charkha.data.decoding import DecodedText, empty_file
from charkha.data.records import FileRecords, Record, blank_lines_note
from charkha.errors import DataError, Problem

if TYPE_CHECKING:
    from _csv import Reader

_SAMPLE_CHARACTERS = 1 << 16
_SAMPLE_RECORDS = 50
_DELIMITERS = (",", ";", "\t", "|")


@dataclass(frozen=True)
class CsvDialect:
    """How the cells of a file are parted and quoted."""

    delimiter: str
    quote: str
    backslash_escapes: bool

    def reader(self, text: str) -> Reader:
        """Cells of each record. Raises csv.Error for a quote that is never closed."""
        return csv.reader(
            io.StringIO(text, newline=""),
            delimiter=self.delimiter,
            quotechar=self.quote,
            doublequote=not self.backslash_escapes,
            escapechar="\\" if self.backslash_escapes else None,
            strict=True,
        )


def detect_dialect(text: str) -> CsvDialect:
    """The delimiter under which the first records have equally many cells, and the quote they use."""
    sample = text[:_SAMPLE_CHARACTERS]
    header = sample.split("\n", 1)[0].strip()
    quote = "'" if header.startswith("'") and header.endswith("'") and '"' not in header else '"'
    backslash = f"\\{quote}" in sample and quote * 2 not in sample.replace(f"\\{quote}", "")
    dialects = [CsvDialect(delimiter, quote, backslash) for delimiter in _DELIMITERS]
    return max(dialects, key=lambda dialect: _agreement(dialect, sample))


def _agreement(dialect: CsvDialect, sample: str) -> tuple[float, int]:
    """(share of records as wide as the header, width); a delimiter that never occurs comes last."""
    widths: list[int] = []
    try:
        for cells in dialect.reader(sample):
            widths.append(len(cells))
            if len(widths) == _SAMPLE_RECORDS:
                break
    except csv.Error:  # the sample may end inside a quoted cell
        pass
    widths = [width for width in widths if width]
    if not widths or widths[0] == 1:
        return (0.0, 1)
    return (sum(width == widths[0] for width in widths) / len(widths), widths[0])


def read_csv_file(path: Path, decoded: DecodedText) -> FileRecords:
    """Records of a .csv or .tsv file; `line` is the physical line on which the record starts.

    Raises DataError when the header names a column twice or no row follows it.
    """
    kind = "tsv" if path.suffix.lower() == ".tsv" else "csv"
    if decoded.problems:  # a hole may have swallowed a quote: nothing after it can be trusted
        return FileRecords(kind, decoded.encoding, (), decoded.problems)
    dialect = CsvDialect("\t", '"', False) if kind == "tsv" else detect_dialect(decoded.text)
    limit = csv.field_size_limit()
    try:
        csv.field_size_limit(sys.maxsize)  # module-wide, so it is put back; the default stops at 128 KiB a cell
        table = _CsvTable(path, dialect, decoded.text)
        table.read()
    finally:
        csv.field_size_limit(limit)
    if not table.records and not table.problems:
        raise empty_file(path)
    notes = (*_dialect_notes(dialect, kind), *blank_lines_note(table.blank))
    return FileRecords(kind, decoded.encoding, tuple(table.records), tuple(table.problems), notes)


def _dialect_notes(dialect: CsvDialect, kind: str) -> tuple[str, ...]:
    usual = CsvDialect("\t" if kind == "tsv" else ",", '"', False)
    if dialect == usual:
        return ()
    name = "tab" if dialect.delimiter == "\t" else dialect.delimiter
    return (f"cells are parted by {name} and quoted with {dialect.quote}",)


class _CsvTable:
    """The records of one table as they are read."""

    def __init__(self, path: Path, dialect: CsvDialect, text: str) -> None:
        self.records: list[Record] = []
        self.problems: list[Problem] = []
        self.blank = 0
        self._path = path
        self._reader = dialect.reader(text)
        self._header: list[str] | None = None

    def read(self) -> None:
        """Reads to the end; a record that cannot be split is reported and the next line tried."""
        while True:
            line = self._reader.line_num + 1
            try:
                cells = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                self.problems.append(Problem(f"broken CSV: {_csv_reason(error)}", line))
                continue
            self._add(cells, line)

    def _add(self, cells: list[str], line: int) -> None:
        if not cells:
            self.blank += 1
        elif self._header is None:
            self._header = _checked_header(self._path, cells)
        elif len(cells) != len(self._header):
            reason = f"wrong number of cells: {len(cells)} where the header has {len(self._header)}"
            self.problems.append(Problem(reason, line))
        else:
            self.records.append(Record(dict(zip(self._header, cells, strict=True)), line))


def _csv_reason(error: csv.Error) -> str:
    return "a quoted cell that starts here is never closed" if "unexpected end" in str(error) else str(error)


def _checked_header(path: Path, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        names = ", ".join(repr(name) for name in twice)
        raise DataError(f"the header names {names} twice", where=f"{path}:1", remedy="give each column its own name")
    return header


def read_parquet_file(path: Path) -> FileRecords:
    """Records of a Parquet file; `line` is the row number from 1. Raises DataError for a file that is none."""
    import pyarrow
    import pyarrow.parquet

    records: list[Record] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                first = len(records) + 1
                records.extend(Record(row, first + index) for index, row in enumerate(batch.to_pylist()))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"the Parquet file cannot be read: {reason}", where=str(path)) from error
    if not records:
        raise empty_file(path)
    return FileRecords("parquet", None, tuple(records))
