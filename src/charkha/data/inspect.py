"""What a data file is: format, encoding, rows, problems, repetitions, and how long its rows are in tokens.

A file is gone through block by block, in several processes where it is large; kept are 24 bytes a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from charkha.data.duplicates import hash_rows
from charkha.data.encoded import EncodedCounts
from charkha.data.formats import FileTally, ReadFile, ReadOptions, RowBlock, RowTask, open_rows
from charkha.data.rows import ChatRow, Row, conversations_of, texts_of
from charkha.data.scripts import script_of
from charkha.data.statistics import ScriptCounts, ScriptTally, TokenCounts, costly_scripts, token_counts
from charkha.data.tokenize import EncodeSettings, encode_block, source_notes
from charkha.data.workers import map_ordered, worker_count
from charkha.errors import FileProblems, Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

Progress = Callable[[Path, int], None]


@dataclass(frozen=True)
class FileStatistics:
    """One file. `tokens` is None without a tokenizer, or where no row could be tokenized.

    `problems` are those of reading and of rendering; `scripts` is by script; `warnings` are of the file as a whole.
    """

    file: ReadFile
    duplicates: int
    tokens: TokenCounts | None
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    scripts: dict[str, ScriptCounts]
    costs: tuple[str, ...] = ()

    def report(self) -> FileProblems:
        """Format, encoding, good rows and every problem, also those of rendering."""
        return replace(self.file.report(), problems=self.problems)


@dataclass(frozen=True, eq=False)
class _BlockStatistics:
    """What is kept of one block: lengths int32 and trained int32 [conversations], hashes uint64 [rows, 2]."""

    read: RowBlock
    rows: int
    hashes: NDArray[np.uint64]
    lengths: NDArray[np.int32]
    trained: int
    scripts: dict[str, tuple[int, int, int, int]]
    unrendered: tuple[Problem, ...]
    tally: Counter[str]
    has_conversations: bool


def inspect_file(
    path: Path,
    *,
    options: ReadOptions | None = None,
    settings: EncodeSettings | None = None,
    max_length: int | None = None,
    workers: int | None = None,
    progress: Progress = lambda path, rows: None,
) -> FileStatistics:
    """Statistics of one file, with tokens where `settings` are given.

    Raises DataError where the file as a whole cannot be used; bad rows are in the result. Rows over `max_length` are
    counted, never refused here.
    """
    opened = open_rows(path, options or ReadOptions())
    tally = FileTally(opened)
    gathered = _Gathered()
    unlimited = None if settings is None else replace(settings, max_length=None)
    for block in map_ordered(_inspect_block, opened.tasks, unlimited, worker_count([path], workers)):
        tally.add(replace(block.read, problems=_merged(block.read.problems, block.unrendered)), rows=block.rows)
        gathered.add(block)
        progress(path, tally.rows)
    read = tally.finish()
    tokens = gathered.tokens(max_length) if settings is not None else None
    scripts = gathered.scripts.counts(has_tokens=settings is not None)
    notes: tuple[str, ...] = ()
    if settings is not None and tokens is not None:
        counts = EncodedCounts(rows=gathered.rows, **gathered.told)
        notes = (*counts.notes(), *source_notes(settings.tokenizer, settings.template, gathered.has_conversations))
    return FileStatistics(
        read, gathered.duplicates(), tokens, read.problems, read.notes + notes, scripts, costly_scripts(scripts)
    )


def _merged(read: tuple[Problem, ...], unrendered: tuple[Problem, ...]) -> tuple[Problem, ...]:
    return tuple(sorted(read + unrendered, key=lambda problem: problem.line or 0)) if unrendered else read


def _inspect_block(settings: EncodeSettings | None, task: RowTask) -> _BlockStatistics:
    """Runs in any process."""
    read = task.run()
    scripts = ScriptTally()
    lengths: list[int] = []
    trained = 0
    unrendered: tuple[Problem, ...] = ()
    tally: Counter[str] = Counter()
    tokens = [0] * len(read.rows)
    if settings is not None:
        owners = [index for index, row in enumerate(read.rows) for _ in conversations_of(row)]
        parts = [part for row in read.rows for part in conversations_of(row)]
        encoded = encode_block(parts, settings)
        unrendered, tally = _once_a_line(encoded.problems), encoded.tally
        for index, pieces in zip(owners, encoded.rows, strict=True):
            for piece in pieces:
                lengths.append(len(piece))
                tokens[index] += len(piece)
                trained += int(piece.trained.sum())
    for row, count in zip(read.rows, tokens, strict=True):
        _add_script(scripts, row, count)
    return _BlockStatistics(
        read=replace(read, rows=(), kept=()),
        rows=len(read.rows) - len(unrendered),
        hashes=hash_rows(read.rows),
        lengths=np.asarray(lengths, dtype=np.int32),
        trained=trained,
        scripts=scripts.sums(),
        unrendered=unrendered,
        tally=tally,
        has_conversations=any(isinstance(part, ChatRow) for row in read.rows for part in conversations_of(row)),
    )


def _once_a_line(problems: tuple[Problem, ...]) -> tuple[Problem, ...]:
    """Both answers of a preference row may be refused for the same reason."""
    return tuple({problem.line: problem for problem in reversed(problems)}.values())[::-1]


def _add_script(scripts: ScriptTally, row: Row, tokens: int) -> None:
    text = "\n".join(text for _, text in texts_of(row))
    size = len(text) if text.isascii() else len(text.encode("utf-8"))
    scripts.add(script_of(text), 1, len(text), size, tokens)


class _Gathered:
    """Sums over the blocks of a file."""

    def __init__(self) -> None:
        self.scripts = ScriptTally()
        self.told: Counter[str] = Counter()
        self.rows = 0
        self.has_conversations = False
        self._trained = 0
        self._lengths: list[NDArray[np.int32]] = []
        self._hashes: list[NDArray[np.uint64]] = []

    def add(self, block: _BlockStatistics) -> None:
        self.scripts.merge(block.scripts)
        self.told.update(block.tally)
        self.rows += block.rows
        self.has_conversations = self.has_conversations or block.has_conversations
        self._trained += block.trained
        self._lengths.append(block.lengths)
        self._hashes.append(block.hashes)

    def tokens(self, max_length: int | None) -> TokenCounts | None:
        lengths = np.concatenate(self._lengths).astype(np.int64) if self._lengths else np.empty(0, dtype=np.int64)
        return token_counts(lengths, self._trained, max_length) if len(lengths) else None

    def duplicates(self) -> int:
        """Rows that say exactly what an earlier one said."""
        if not self._hashes:
            return 0
        hashes = np.concatenate(self._hashes)
        ordered = hashes[np.lexsort((hashes[:, 1], hashes[:, 0]))]
        return int((ordered[1:] == ordered[:-1]).all(axis=1).sum())


def mix_of(statistics: Mapping[str, tuple[int, float]]) -> dict[str, float]:
    """Share of each source in an epoch, from its rows (or tokens) and its weight."""
    total = sum(amount * weight for amount, weight in statistics.values())
    return {name: round(amount * weight / total, 4) for name, (amount, weight) in statistics.items()} if total else {}
