"""A file gone through once for what a split needs to know, without keeping its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from charkha.data.formats import FileTally, ReadFile, ReadOptions, RowBlock, RowTask, open_rows
from charkha.data.splits import SplitKeys, SplitWish, joined, split_keys
from charkha.data.workers import map_ordered
from charkha.errors import DataError


@dataclass(frozen=True, eq=False)
class IndexedFile:
    """`kinds` are the names of the row types in the file; `block_rows` counts the rows of each block."""

    read: ReadFile
    keys: SplitKeys
    kinds: frozenset[str]
    block_rows: tuple[int, ...]


def index_file(
    path: Path,
    options: ReadOptions,
    wish: SplitWish,
    workers: int,
    progress: Callable[[Path, int], None] = lambda path, rows: None,
) -> IndexedFile:
    """What a split needs to know of a file. Problems are in the result.

    Raises DataError where the file as a whole cannot be used, or lacks the column to split by.
    """
    opened = open_rows(path, replace(options, keep=wish.columns))
    tally = FileTally(opened)
    parts: list[SplitKeys] = []
    kinds: set[str] = set()
    for block, keys, found in map_ordered(_index_block, opened.tasks, wish, workers):
        tally.add(block, rows=len(keys.hashes))
        parts.append(keys)
        kinds |= found
        progress(path, tally.rows)
    read = tally.finish()
    missing = [name for name in wish.columns if name not in read.columns]
    if missing and read.row_count:
        raise DataError(
            f"there is no column {missing[0]!r} to split by; the file has: {', '.join(read.columns)}",
            where=str(path),
            remedy="correct data.group_by or data.time_by",
        )
    return IndexedFile(read, joined(parts), frozenset(kinds), tuple(len(part.hashes) for part in parts))


def _index_block(wish: SplitWish, task: RowTask) -> tuple[RowBlock, SplitKeys, set[str]]:
    """Runs in any process."""
    block = task.run()
    keys, problems = split_keys(block, wish)
    kinds = {type(row).__name__ for row in block.rows}
    return replace(block, rows=(), kept=(), problems=block.problems + problems), keys, kinds
