"""CSV, TSV, Parquet and Arrow to records: one dictionary a row, keyed by column, some hundred rows at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charkha.data.decoding import TextEncoding, Undecodable, text_chunks
from charkha.data.records import Block, OpenFile, ParsedBlock, Record
from charkha.data.sources import LARGEST_RATIO, LONGEST_LINE_BYTES, UNPACKED_FREELY_BYTES, Source
from charkha.errors import DataError, Problem

if TYPE_CHECKING:
    from _csv import Reader

_SAMPLE_CHARACTERS = 1 << 16
_SAMPLE_RECORDS = 50
_DELIMITERS = (",", ";", "\t", "|")
_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class CsvDialect:
    """How the cells of a file are parted and quoted."""

    delimiter: str
    quote: str
    backslash_escapes: bool

    def reader(self, lines: Iterable[str]) -> Reader:
        """Cells of each record. Raises csv.Error for a quote that is never closed."""
        return csv.reader(
            lines,
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
        for cells in dialect.reader(io.StringIO(sample, newline="")):
            widths.append(len(cells))
            if len(widths) == _SAMPLE_RECORDS:
                break
    except csv.Error:  # the sample may end inside a quoted cell
        pass
    widths = [width for width in widths if width]
    if not widths or widths[0] == 1:
        return (0.0, 1)
    return (sum(width == widths[0] for width in widths) / len(widths), widths[0])


def open_csv_file(source: Source, encoding: TextEncoding) -> OpenFile:
    """Records of a .csv or .tsv file; `line` is the physical line on which the record starts.

    Raises DataError when the header names a column twice.
    """
    kind = source.suffix[1:]
    sample = next(source.chunks())[encoding.skip :].decode(encoding.codec, errors="replace")
    dialect = CsvDialect("\t", '"', False) if kind == "tsv" else detect_dialect(sample)
    lines = _physical_lines(source.path, text_chunks(source.chunks(), encoding))
    table = _CsvTable(source.path, dialect.reader(lines))
    return OpenFile(kind, encoding.name, table.blocks(), (*encoding.notes, *_dialect_notes(dialect, kind)))


def _physical_lines(path: Path, chunks: Iterable[str]) -> Iterator[str]:
    """Lines with their ends, which may be those of any system. Raises DataError for one of over 64 MiB."""
    carried: list[str] = []
    size, number, half = 0, 1, ""
    for chunk in chunks:
        text = half + chunk
        half = "\r" if text.endswith("\r") else ""  # may be half of "\r\n"
        lines = list(io.StringIO(text.removesuffix("\r"), newline=""))
        if lines and lines[-1].endswith(("\n", "\r")):
            lines.append("")
        for line in lines[:-1]:
            yield "".join((*carried, line))
            carried, size = [], 0
            number += 1
        carried.extend(lines[-1:])
        size += len(lines[-1]) if lines else 0
        if size > LONGEST_LINE_BYTES:
            message = f"the line is longer than {LONGEST_LINE_BYTES >> 20} MiB"
            raise DataError(message, where=f"{path}:{number}", remedy="write one row a line")
    if carried or half:
        yield "".join((*carried, half))


def _dialect_notes(dialect: CsvDialect, kind: str) -> tuple[str, ...]:
    usual = CsvDialect("\t" if kind == "tsv" else ",", '"', False)
    if dialect == usual:
        return ()
    name = "tab" if dialect.delimiter == "\t" else dialect.delimiter
    return (f"cells are parted by {name} and quoted with {dialect.quote}",)


@contextmanager
def _large_cells() -> Iterator[None]:
    """Cells of up to 64 MiB; the limit is module-wide, so it is put back. Its default is 128 KiB."""
    limit = csv.field_size_limit(LONGEST_LINE_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


class _CsvTable:
    """The records of one table as they are read."""

    def __init__(self, path: Path, reader: Reader) -> None:
        self._path = path
        self._reader = reader
        self._header: list[str] | None = None
        self._records: list[Record] = []
        self._problems: list[Problem] = []
        self._blank = 0

    def blocks(self) -> Iterator[Block]:
        """The table in parts; a record that cannot be split is reported and the next line tried."""
        has_more = True
        while has_more:
            with _large_cells():
                has_more = self._read_some()
            yield ParsedBlock(tuple(self._records), tuple(self._problems), self._blank)
            self._records, self._problems, self._blank = [], [], 0

    def _read_some(self) -> bool:
        """Whether there may be more. Cells bound the block, too: a row can be of any size."""
        characters = 0
        while len(self._records) + self._blank < _BLOCK_ROWS and characters < 1 << 20:
            line = self._reader.line_num + 1
            try:
                cells = next(self._reader)
            except StopIteration:
                return False
            except csv.Error as error:
                self._problems.append(Problem(f"broken CSV: {_csv_reason(error)}", line))
                continue
            except Undecodable as stop:  # a hole may have swallowed a quote: nothing after it can be trusted
                self._problems.append(stop.problem)
                return False
            characters += sum(map(len, cells))
            self._add(cells, line)
        return True

    def _add(self, cells: list[str], line: int) -> None:
        if not cells:
            self._blank += 1
        elif self._header is None:
            self._header = _checked_header(self._path, cells)
        elif len(cells) != len(self._header):
            reason = f"wrong number of cells: {len(cells)} where the header has {len(self._header)}"
            self._problems.append(Problem(reason, line))
        else:
            self._records.append(Record(dict(zip(self._header, cells, strict=True)), line))


def _csv_reason(error: csv.Error) -> str:
    return "a quoted cell that starts here is never closed" if "unexpected end" in str(error) else str(error)


def _checked_header(path: Path, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        names = ", ".join(repr(name) for name in twice)
        raise DataError(f"the header names {names} twice", where=f"{path}:1", remedy="give each column its own name")
    return header


def open_parquet_file(source: Source) -> OpenFile:
    """Records of a Parquet file; `line` is the row number from 1. Raises DataError for a file that is none."""
    import pyarrow.parquet

    def batches(path: Path) -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_bomb(path, file.metadata)
            yield from file.iter_batches(batch_size=_BLOCK_ROWS)

    return OpenFile("parquet", None, _binary_blocks(source, "Parquet", batches))


def _refuse_bomb(path: Path, metadata: Any) -> None:
    """Raises DataError for a column that would unpack to more than 256 MiB and 200 times what it takes here."""
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            unpacked = column.total_uncompressed_size
            if unpacked > max(UNPACKED_FREELY_BYTES, LARGEST_RATIO * column.total_compressed_size):
                raise DataError(
                    f"the column {column.path_in_schema!r} unpacks to {unpacked >> 20} MiB out of "
                    f"{column.total_compressed_size} bytes: it is hardly text",
                    where=str(path),
                    remedy="leave the column out of the file",
                )


def open_arrow_file(source: Source) -> OpenFile:
    """Records of an Arrow file, stream or Feather file; `line` is the row number from 1. Raises DataError."""
    import pyarrow

    def batches(path: Path) -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                opened = pyarrow.ipc.open_file(file)
                whole = (opened.get_batch(index) for index in range(opened.num_record_batches))
            else:
                file.seek(0)
                whole = iter(pyarrow.ipc.open_stream(file))
            for batch in whole:
                yield from (batch.slice(start, _BLOCK_ROWS) for start in range(0, batch.num_rows, _BLOCK_ROWS))

    return OpenFile("arrow", None, _binary_blocks(source, "Arrow", batches))


def _binary_blocks(source: Source, name: str, batches: Callable[[Path], Iterator[Any]]) -> Iterator[Block]:
    import pyarrow

    if source.packing is not None:
        raise DataError(f"a packed {name} file is not read", where=str(source.path), remedy="unpack it first")
    first = 1
    try:
        for batch in batches(source.path):
            rows = batch.to_pylist()
            yield ParsedBlock(tuple(Record(row, first + index) for index, row in enumerate(rows)))
            first += len(rows)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"the {name} file cannot be read: {reason}", where=str(source.path)) from error
