"""What a data file is: format, encoding, rows, problems, and how long its rows are in tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from charkha.data.encoded import EncodedRow
from charkha.data.formats import ReadFile, read_rows
from charkha.data.prepare import count_duplicates
from charkha.data.render import TrainOn
from charkha.data.rows import Row
from charkha.data.templates import ChatTemplate
from charkha.data.tokenize import encode_rows
from charkha.data.tokenizer import Tokenizer
from charkha.errors import DataError, FileProblems, Problem


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of the rows of one file, end tokens included. `trained` are those that are learned."""

    total: int
    trained: int
    shortest: int
    median: int
    p95: int
    longest: int


@dataclass(frozen=True)
class FileStatistics:
    """One file. `tokens` is None without a tokenizer, or where no row could be tokenized."""

    file: ReadFile
    duplicates: int
    tokens: TokenCounts | None
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    def report(self) -> FileProblems:
        """Format, encoding, good rows and every problem, also those of rendering."""
        read = self.file
        rows = len(read.rows) - (len(self.problems) - len(read.problems))
        return FileProblems(str(read.path), read.format, read.encoding, rows, self.problems)


def inspect_file(
    path: Path,
    *,
    format: str = "auto",
    mapping: Mapping[str, str] | None = None,
    tokenizer: Tokenizer | None = None,
    template: ChatTemplate | None = None,
    train_on: TrainOn = "responses",
) -> FileStatistics:
    """Statistics of one file. Raises DataError where the file as a whole cannot be used; bad rows are in the result."""
    read = read_rows(path, format=format, mapping=mapping)
    tokens, problems, notes = _tokens(read, tokenizer, template, train_on)
    every = tuple(sorted(read.problems + problems, key=lambda problem: problem.line or 0))
    return FileStatistics(read, count_duplicates(read.rows), tokens, every, read.notes + notes)


def _tokens(
    read: ReadFile, tokenizer: Tokenizer | None, template: ChatTemplate | None, train_on: TrainOn
) -> tuple[TokenCounts | None, tuple[Problem, ...], tuple[str, ...]]:
    if tokenizer is None or not read.rows:
        return None, (), ()
    rows: tuple[Row, ...] = read.rows
    problems: tuple[Problem, ...] = ()
    try:
        encoded = encode_rows(rows, tokenizer, template, train_on=train_on, source=str(read.path))
    except DataError as error:
        problems = tuple(problem for file in error.files for problem in file.problems)
        bad = {problem.line for problem in problems}
        rows = tuple(row for row in rows if row.line not in bad)
        if not rows:
            return None, problems, ()
        encoded = encode_rows(rows, tokenizer, template, train_on=train_on, source=str(read.path))
    return token_counts(encoded.rows), problems, encoded.notes


def token_counts(rows: tuple[EncodedRow, ...]) -> TokenCounts:
    """Lengths of encoded rows; median and p95 are lengths that occur."""
    lengths = sorted(len(row) for row in rows)
    last = len(lengths) - 1
    return TokenCounts(
        total=sum(lengths),
        trained=sum(int(row.trained.sum()) for row in rows),
        shortest=lengths[0],
        median=lengths[last // 2],
        p95=lengths[round(last * 0.95)],
        longest=lengths[-1],
    )
